"""Files of ds_configs/, and the sizes of ZeRO's buckets that `"auto"` stands for in them. No torch, no DeepSpeed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.layers import merge_mappings
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.config.sections.deepspeed import DeepSpeedSpec, find_deepspeed_paths


def load_ds_config(written: LocalPath) -> dict[str, Any]:
    """Read a file of ds_configs/ by name, or any JSON file by path; its paths as they are written there.

    Raises `UserError`.
    """
    name_or_path = written.expanded()
    candidates = (Path(name_or_path), DS_CONFIGS / f"{name_or_path}.json")
    path = next((path for path in candidates if os.path.isfile(path)), None)
    if path is None:
        known = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise UserError(
            f"{written.where or 'deepspeed.config'}: '{name_or_path}' is neither a file that can be read nor one of "
            f"{', '.join(known)}{did_you_mean(name_or_path, known)}"
        )
    try:
        config = read_object(path)
    except JsonError as error:
        raise UserError(
            f"{written.where or 'deepspeed.config'}: {error}; it must hold one JSON object"
        ) from None
    return find_deepspeed_paths(config, f"{path}: ")


def written_ds_config(spec: DeepSpeedSpec) -> dict[str, Any]:
    """The file with the recipe's overrides, as they are written: `"auto"` still stands. Raises `UserError`."""
    return merge_mappings(load_ds_config(spec.config), spec.overrides)


@dataclass(frozen=True, kw_only=True, order=True)
class BucketSize:
    """Elements of a bucket of gradients, and `why` so many."""

    elements: int
    why: str


# A hop of a ring takes 2 to 10 us (`bico_ds.planner.communication`), and a node of eight adapters of 400 Gb/s sends, in
# 5 us, 2 MB. With 4 MB per rank, a million elements in fp32, hops are a third of the time, and in bf16 a half.
_PER_RANK = 1_000_000
# Projections of attention and a gated MLP of Llama's shapes: 13 squares in 8B, 12.8 in 70B.
_SQUARES_OF_LAYER = 12


def bucket_size(hidden_size: int, *, ranks: int, nodes: int) -> BucketSize:
    """How many gradients are reduced together: a matrix, or what a ring over nodes needs to be busy with sending.

    The largest holds; of the three across nodes first the smallest, since the buffer is there all the time, and what is sent
    only after a layer's backward pass has less left to hide behind.
    """
    square = hidden_size * hidden_size
    across = min(
        BucketSize(elements=_PER_RANK * ranks, why=f"a ring of {ranks} ranks: hops take a third of the time"),
        BucketSize(elements=_SQUARES_OF_LAYER * square, why="a layer: the next one hides what is sent of it"),
        BucketSize(elements=500_000_000, why="the buffer takes 2 GB in fp32"),
    )
    return max(
        BucketSize(elements=square, why="a square weight: hops take little beside it"),
        BucketSize(elements=1_000_000, why="a small model: its weights go together"),
        *([across] if nodes > 1 else []),
    )


def bucket_sizes(hidden_size: int, *, ranks: int, ranks_per_node: int) -> dict[str, int]:
    """Elements that `"auto"` stands for, by key of `zero_optimization`, on so many ranks.

    Prefetching stops when a bucket is full: at a little less than the reduction's it gathers no matrix too many. Norms and
    biases are not partitioned. ZeRO-2 gathers an even number, or ends in an assertion.
    """
    elements = bucket_size(hidden_size, ranks=ranks, nodes=-(-ranks // ranks_per_node)).elements
    return {
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements + elements % 2,
        "stage3_prefetch_bucket_size": max(int(0.9 * elements), 1_000_000),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
