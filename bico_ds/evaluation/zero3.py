"""Whole weights for evaluation under ZeRO-3: a plain replica of the model, filled by gathering once.

Evaluating the partitioned model itself gathers every layer's weights again for every token, and needs equal
numbers of forward passes on all ranks (`synced=True` in the suite). Where a whole copy fits, a replica is
faster and has no hooks of DeepSpeed that could partition a weight in the middle of a generation.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

_GATHER_NUMEL = 64_000_000  # parameters gathered at one time


def parameter_count(model: nn.Module) -> int:
    """Parameters of the whole model, partitioned or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned any weight of `model`."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@torch.no_grad()
def whole_replica(model: Any, *, device: torch.device | str) -> Any:
    """A copy of the Hugging Face causal LM `model` with whole weights on `device`, same dtype, in eval mode.

    A collective: under ZeRO-3 all ranks call it together. The copy has Hugging Face's own attention. A `peft`
    model is copied with its adapters.
    """
    replica = _skeleton(model).to_empty(device=device)
    _tie(replica)  # to_empty unties
    _fill(replica, model)
    return replica.eval()


def _skeleton(model: Any) -> Any:
    """The same network on the meta device. Built by its class and not by `from_config`, which would partition
    it.
    """
    if isinstance(model, PeftModel):
        adapter = model.active_adapter
        with torch.device("meta"):
            return get_peft_model(_skeleton(model.get_base_model()), model.peft_config[adapter], adapter)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return type(model)(config)


def _fill(replica: nn.Module, model: nn.Module) -> None:
    targets = dict(replica.named_parameters())
    waiting: list[tuple[str, nn.Parameter]] = []
    numel = 0
    for name, parameter in model.named_parameters():
        waiting.append((name, parameter))
        numel += getattr(parameter, "ds_numel", parameter.numel())
        if numel >= _GATHER_NUMEL:
            _copy_gathered(targets, waiting)
            waiting, numel = [], 0
    _copy_gathered(targets, waiting)
    assert not targets, f"weights without a source: {sorted(targets)[:3]}"
    sources = dict(model.named_buffers())
    for name, buffer in replica.named_buffers():
        buffer.data = sources[name].detach().to(buffer.device).clone()


def _copy_gathered(targets: dict[str, nn.Parameter], waiting: list[tuple[str, nn.Parameter]]) -> None:
    """Copy whole weights into `targets`, taking each out of it."""
    partitioned = [parameter for _, parameter in waiting if hasattr(parameter, "ds_id")]
    with _gathered(partitioned) if partitioned else nullcontext():
        for name, parameter in waiting:
            target = targets.pop(name)
            target.data = parameter.detach().to(target.device).clone()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _tie(replica: Any) -> None:
    base = replica.get_base_model() if isinstance(replica, PeftModel) else replica
    base.tie_weights()
