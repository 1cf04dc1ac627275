"""What ranks tell each other of a step: one vector, summed over all of them, and the one reading of the device in a step.

It holds what the step gave, the gradient norm of the step before, and what must be known of the following step before its
first forward pass. A step that none prepares, the first one or one after a pause, needs a vector of its own (`agree`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from bico_ds.batch import PackedBatch
from bico_ds.data.loading.loader import RankStep
from bico_ds.model.head import Losses
from bico_ds.runtime.distributed import all_reduce_sum
from bico_ds.training.run import Run


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Of the whole global batch: its targets, and the rows that are compared with the start model."""

    targets: int
    compared: int


@dataclass(frozen=True, kw_only=True)
class AgreedStep:
    """A step that has not begun: this rank's share, and what all ranks know. `stop`: one was asked to stop before it."""

    rank_step: RankStep
    counts: StepCounts
    stop: bool


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Of a step, over all ranks: sums of losses and divergences (nats), rows, original tokens, pairs, seconds of waiting.

    `source_losses` and `source_targets`: the same of each data source, where there are several. `norm_before`: the gradient
    norm of the step before, NaN where it was not given. `following`: the next step, where it was given.
    """

    loss: float
    divergence: float
    rows: int
    represented: int
    pairs: int
    wait_seconds: float
    source_losses: Sequence[float]
    source_targets: Sequence[float]
    norm_before: float
    following: AgreedStep | None


def agree(rank_step: RankStep, run: Run) -> AgreedStep:
    """Make a step known by itself. Collective; waits for the device."""
    return _agreed(rank_step, all_reduce_sum(_votes(rank_step, run), run.ranks.device))


def add_up(
    batches: Sequence[PackedBatch],
    found: Sequence[Losses],
    run: Run,
    *,
    sources: int,
    wait_seconds: float,
    norm_before: torch.Tensor | None,
    following: RankStep | None,
) -> StepTotals:
    """Add up a step of these micro-batches, of which the model found `found`. Collective; waits for the device, once.

    `sources`: how many data sources there are; `norm_before`: a scalar, on the device or the host, the first rank's counts.
    """
    device, work = run.ranks.device, _work(batches)
    norm = torch.tensor(math.nan) if norm_before is None else norm_before
    norm = norm.to(device, non_blocking=True).double().reshape(1)
    norm = norm if run.ranks.is_first else torch.zeros_like(norm)
    on_device = torch.cat([norm, _sums(batches, found, sources, device)])
    votes = [] if following is None else _votes(following, run)
    numbers = iter(all_reduce_sum([*votes, *work, wait_seconds], device, on_device))
    # In the order of the votes, the work, the seconds, and what is on the device.
    votes = list(islice(numbers, len(votes)))
    rows, represented, pairs = map(int, islice(numbers, len(work)))
    return StepTotals(
        following=None if following is None else _agreed(following, votes),
        rows=rows,
        represented=represented,
        pairs=pairs,
        wait_seconds=next(numbers),
        norm_before=next(numbers),
        loss=next(numbers),
        divergence=next(numbers),
        source_losses=list(islice(numbers, sources)),
        source_targets=list(numbers),
    )


def _votes(rank_step: RankStep, run: Run) -> list[float]:
    """What this rank tells of a step: its targets, its compared rows, and whether it was asked to stop."""
    targets = sum(len(batch.targets) for batch in rank_step.batches)
    compared = sum(len(batch.compared.index) for batch in rank_step.batches if batch.compared is not None)
    return [targets, compared, float(bool(run.stop))]


def _agreed(rank_step: RankStep, votes: Sequence[float]) -> AgreedStep:
    """`votes`: the sums of those of all ranks."""
    targets, compared, stops = map(int, votes)
    counts = StepCounts(targets=targets, compared=compared)
    return AgreedStep(rank_step=rank_step, counts=counts, stop=stops > 0)


def _work(batches: Sequence[PackedBatch]) -> list[int]:
    """Rows, the original tokens that they represent, and the pairs that attention sees."""
    return [
        sum(len(batch.input_ids) for batch in batches),
        sum(batch.represented_tokens for batch in batches),
        sum(batch.plan.num_pairs for batch in batches),
    ]


def _sums(
    batches: Sequence[PackedBatch], found: Sequence[Losses], sources: int, device: torch.device
) -> torch.Tensor:
    """Loss and divergence; of several sources each one's loss, then each one's targets: fp64, on the device."""
    if not found:
        return torch.zeros(2, dtype=torch.float64, device=device)
    sums = torch.stack([torch.stack((part.loss, part.divergence)) for part in found]).double().sum(0)
    if sources == 1:
        return sums
    numbers = torch.cat([batch.target_sources for batch in batches if batch.target_sources is not None])
    losses = torch.cat([part.row_losses for part in found]).double()
    # Counted by additions, because `bincount` would wait for the device.
    counted = torch.stack((losses, torch.ones_like(losses)))
    by_source = sums.new_zeros(2, sources).index_add_(1, numbers.to(device, non_blocking=True), counted)
    return torch.cat([sums, by_source.flatten()])
