"""Where DeepSpeed (0.19) keeps what every optimizer has, in memory and in checkpoint files: step counts, fp32 masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MASTERS = "fp32_flat_groups"


def step_counts(optimizer: Optimizer) -> list[int]:
    """The step counts in this rank's state, each once: one number where all is well, none before the first update."""
    return sorted({int(state["step"]) for state in optimizer.state.values() if "step" in state})


def separate_step_counters(optimizer: Optimizer) -> None:
    """After a universal load, which hands one step tensor to all sub-groups: each would add one to it, in every step."""
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def drop_tensors(common: dict[str, Any]) -> None:
    """Keep of a universal checkpoint's common optimizer state, in place, what a load reads: the step counts.

    DeepSpeed leaves all tensors of rank 0 in it, for every rank to read.
    """
    common.pop(_MASTERS, None)
    inner = common["optimizer_state_dict"]
    inner["state"] = {index: {"step": values["step"]} for index, values in inner["state"].items()}


def flat_masters(rank_state: dict[str, Any]) -> tuple[list[Tensor], int]:
    """One rank's flat fp32 masters in its ZeRO-3 optimizer file, one tensor per group, and the number of ranks."""
    state = rank_state["optimizer_state_dict"]
    return state[_MASTERS], state["partition_count"]
