"""Checksums of everything a resume must bring back: weights, fp32 masters, the optimizer's moments and step count.

They are sums over the ranks' slices (`bico_ds.model.weights.checksums`), so the same numbers hold at any number of ranks and
in ZeRO stages 1, 2 and 3. A load that silently did nothing (DeepSpeed#6691, #5430, #7848) cannot pass them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.checksums import add_over_ranks, parameter_checksums, slice_checksum
from bico_ds.model.weights.materialize import is_partitioned, partition_bounds
from bico_ds.optim.state import step_counts
from bico_ds.optim.table import kind_running

Checksums = dict[str, dict[str, int]]
"""By kind (`weight`, `master`, and each of the optimizer's moments), the checksum of each parameter."""


def state_checksums(engine: Engine) -> Checksums:
    """Checksums of every trained parameter and of its optimizer state. Collective; the same on every rank."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    kinds = ("master", *kind_running(engine.optimizer.optimizer).spec.state.moments)
    own = torch.tensor(
        [[_own(engine, p, kind) for p in trained.values()] for kind in kinds], dtype=torch.int64
    )
    summed = dict(zip(kinds, add_over_ranks(own).tolist(), strict=True))
    weights = {"weight": parameter_checksums(trained.items())}
    return weights | {kind: dict(zip(trained, sums, strict=True)) for kind, sums in summed.items()}


def optimizer_steps(engine: Engine) -> list[int]:
    """The step counts in this rank's state, as `step_counts`."""
    return step_counts(engine.optimizer.optimizer)


def differences(found: Checksums, expected: Checksums) -> list[str]:
    """Name what differs, as in `exp_avg of causal_lm.lm_head.weight`."""
    wrong = []
    for kind, sums in expected.items():
        mine = found.get(kind, {})
        wrong += [
            f"{kind} of {name}" for name in sorted(set(sums) | set(mine)) if sums.get(name) != mine.get(name)
        ]
    return wrong


def _own(engine: Engine, parameter: nn.Parameter, kind: str) -> int:
    return sum(slice_checksum(flat, start) for flat, start in _slices(engine, parameter, kind))


def _slices(engine: Engine, parameter: Any, kind: str) -> Iterator[tuple[Tensor, int]]:
    """What this rank holds of a parameter's fp32 state: (flat slice, index of its first element).

    Nothing where there are no moments yet, before the first update: zeros, whose checksum is 0.
    """
    moment = None if kind == "master" else kind
    zero = engine.optimizer
    if is_partitioned(parameter):  # ZeRO-3
        start, stop = partition_bounds(parameter)
        with contextlib.suppress(KeyError):  # no moments
            yield zero.get_local_fp32_param(parameter, moment)[: stop - start], start
    elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO-1 and 2: a fragment, or nothing
        mapping = parameter._hp_mapping
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        fragment = mapping.hp_fragment_address
        held = flat if moment is None else zero.optimizer.state.get(flat, {}).get(moment)
        if held is not None:
            yield held[fragment.start : fragment.start + fragment.numel], mapping.lp_fragment_address.start
