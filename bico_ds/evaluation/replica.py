"""A replica of the model to evaluate under ZeRO-3: a plain model with the full weights, gathered once.

Evaluating the partitioned model itself gathers every layer's weights again for every token, and needs the same number of
forward passes on all ranks (`PromptShare.synced`). Where a full copy fits into memory, a replica is faster, and has no hooks
of DeepSpeed that could partition a weight in the middle of a generation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bico_ds.model.lora import merge_adapters
from bico_ds.model.weights.export_model import exported_parameters
from bico_ds.model.weights.materialize import full_numel, gathered

_GATHER_NUMEL = 64_000_000  # parameters gathered at one time


@torch.no_grad()
def full_replica(model: PreTrainedModel, *, device: torch.device | str) -> PreTrainedModel:
    """A copy of the Hugging Face causal LM `model` with full weights on `device`, in the same dtype, in eval mode.

    Collective under ZeRO-3. The copy is what an export of the model would load as: with Hugging Face's own attention, and
    adapters merged.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        replica = type(model)(config)  # not by `from_config`, which would partition it under ZeRO-3
    for parameter in replica.parameters():  # built in fp32, whatever the config's dtype
        parameter.data = parameter.data.to(model.dtype)
    replica.to_empty(device=device)
    replica.tie_weights()  # to_empty unties
    replica.generation_config = copy.deepcopy(model.generation_config)
    _fill(replica, model)
    return replica.eval()


def _fill(replica: nn.Module, model: nn.Module) -> None:
    targets = dict(replica.named_parameters())
    waiting: list[tuple[str, tuple[Any, ...]]] = []
    numel = 0
    for name, parts in exported_parameters(model):
        waiting.append((name, parts))
        numel += full_numel(parts[0])
        if numel >= _GATHER_NUMEL:
            _copy_gathered(targets, waiting)
            waiting, numel = [], 0
    _copy_gathered(targets, waiting)
    assert not targets, f"weights without a source: {sorted(targets)[:3]}"
    sources = dict(model.named_buffers())
    for name, buffer in replica.named_buffers():
        buffer.data = sources[name].detach().to(buffer.device).clone()


def _copy_gathered(targets: dict[str, nn.Parameter], waiting: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Copy full weights into `targets`, and remove each that was copied. Parts: (base,) or (base, A, B, scaling)."""
    with gathered(tuple(tensor for _, parts in waiting for tensor in parts[:3])):
        for name, parts in waiting:
            weight = merge_adapters(*parts) if len(parts) > 1 else parts[0].detach().clone()
            target = targets.pop(name)
            target.data = weight.to(device=target.device, dtype=parts[0].dtype)
