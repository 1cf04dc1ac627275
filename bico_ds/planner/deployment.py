"""Where a run is planned: nodes, ranks, their devices, and what DeepSpeed's configuration divides over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args

from bico_ds.common.errors import UserError
from bico_ds.config.bounds import Bound
from bico_ds.config.deepspeed_file import bucket_sizes, written_ds_config
from bico_ds.config.schema import Recipe
from bico_ds.planner.devices import Device

Offload = Literal["none", "cpu", "nvme"]

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_COUNT = Bound(least=0, most=2**63 - 1, why="it counts parameters, buffers or ranks")
_BOUNDS = {
    "stage": Bound(least=1, most=3, why="a run needs ZeRO, which has no other stages"),
    "reduce_bucket_size": Bound(least=1, most=10**10, why="a buffer of so many numbers is allocated"),
    "allgather_bucket_size": Bound(least=1, most=2**63 - 1, why="so many elements are gathered at once"),
}


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What of a DeepSpeed configuration memory and communication depend on; buckets and thresholds in elements.

    `secondary_ranks`: over how many ranks hpZ divides its second copy of the weights; None: there is none.
    `gradient_bytes`, `communication_bytes`: per element of the accumulated gradients, and of those on the way.
    """

    stage: int
    offload_optimizer: Offload
    offload_parameters: Offload
    secondary_ranks: int | None
    reduce_bucket: int
    allgather_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    sub_group_size: int
    overlap_comm: bool
    contiguous_gradients: bool
    pin_memory: bool
    buffer_count: int
    gradient_bytes: int
    communication_bytes: int


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """`nodes` nodes of `ranks_per_node` ranks, each on a `device` of its own (of kind "cpu": on the host)."""

    device: Device
    nodes: int
    ranks_per_node: int
    zero: Zero

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def spread(ranks: int, per_node: int) -> tuple[int, int]:
    """Nodes and ranks of each, for `ranks` in all and at most `per_node` of them on a node; all nodes have as many."""
    of_each = max(count for count in range(1, min(ranks, per_node) + 1) if ranks % count == 0)
    return ranks // of_each, of_each


def read_zero(recipe: Recipe, *, hidden_size: int, ranks: int, ranks_per_node: int, on_cuda: bool) -> Zero:
    """What the recipe's DeepSpeed configuration means for so many ranks; `"auto"` filled as runs fill it.

    `hidden_size`: the model's. Raises `UserError` where a file is not there, or a value is none to plan with. All else is
    checked where a run is (`bico_ds.runtime.ds_checks`).
    """
    config = written_ds_config(recipe.deepspeed)
    zero = _mapping(config, "zero_optimization")
    automatic: dict[str, Any] = {
        **bucket_sizes(hidden_size, ranks=ranks, ranks_per_node=ranks_per_node),
        "overlap_comm": on_cuda,
        "zero_hpz_partition_size": min(ranks_per_node, ranks),
        "pin_memory": on_cuda,
    }

    def value(section: dict[str, Any], key: str, default: Any) -> Any:
        """As written, or as filled in; DeepSpeed's own default where the key is left out."""
        found = section.get(key, default)
        found = automatic[key] if found == "auto" and key in automatic else found
        if default is not None and not isinstance(
            found, type(default) if isinstance(default, bool) else int | float
        ):
            raise UserError(f"deepspeed: zero_optimization: {key}: cannot plan with {found!r}")
        if not isinstance(found, bool) and (problem := _BOUNDS.get(key, _COUNT).problem(found)) is not None:
            raise UserError(f"deepspeed: zero_optimization: {key}: {problem}")
        return found

    optimizer, dtype = _mapping(zero, "offload_optimizer"), recipe.model.dtype
    hpz = value(zero, "zero_hpz_partition_size", 1)
    return Zero(
        stage=int(value(zero, "stage", 0)),
        offload_optimizer=_one_of(config, "zero_optimization.offload_optimizer.device", get_args(Offload))
        or "none",
        offload_parameters=_one_of(config, "zero_optimization.offload_param.device", get_args(Offload))
        or "none",
        secondary_ranks=int(hpz) if hpz > 1 else None,
        reduce_bucket=int(value(zero, "reduce_bucket_size", 5e8)),
        allgather_bucket=int(value(zero, "allgather_bucket_size", 5e8)),
        prefetch_bucket=int(value(zero, "stage3_prefetch_bucket_size", 5e7)),
        persistence_threshold=int(value(zero, "stage3_param_persistence_threshold", 1e5)),
        max_live_parameters=int(value(zero, "stage3_max_live_parameters", 1e9)),
        max_reuse_distance=int(value(zero, "stage3_max_reuse_distance", 1e9)),
        sub_group_size=int(value(zero, "sub_group_size", 1e9)),
        overlap_comm=value(zero, "overlap_comm", False),
        contiguous_gradients=value(zero, "contiguous_gradients", True),
        pin_memory=value(optimizer, "pin_memory", False),
        buffer_count=int(value(optimizer, "buffer_count", 4)),
        gradient_bytes=ELEMENT_BYTES[_one_of(config, "data_types.grad_accum_dtype", ELEMENT_BYTES) or dtype],
        communication_bytes=ELEMENT_BYTES[_one_of(config, "communication_data_type", ELEMENT_BYTES) or dtype],
    )


def _one_of(config: dict[str, Any], dotted: str, known: Iterable[str]) -> Any:
    """One of the words that are known; None where the key is left out, or null."""
    *sections, key = dotted.split(".")
    section = reduce(_mapping, sections, config)
    found = section.get(key)
    found = found.lower() if isinstance(found, str) else found
    if found is not None and found not in tuple(known):
        raise UserError(f"deepspeed: {dotted}: {found!r} is not one of {', '.join(known)}")
    return found


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"deepspeed: '{key}' must be a mapping of keys, found {section!r}")
    return section
