"""Files of ds_configs/, and the sizes of ZeRO's buckets that `"auto"` stands for in them. No torch, no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.load import merge_mappings
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.config.schema import DeepSpeedSpec, find_deepspeed_paths


def load_ds_config(written: LocalPath) -> dict[str, Any]:
    """Read a file of ds_configs/ by name, or any JSON file by path; its paths as they are written there.

    Raises `UserError`.
    """
    name_or_path = written.expanded()
    path = next((p for p in (Path(name_or_path), DS_CONFIGS / f"{name_or_path}.json") if p.is_file()), None)
    if path is None:
        known = sorted(p.stem for p in DS_CONFIGS.glob("*.json"))
        raise UserError(
            f"deepspeed.config: '{name_or_path}' is neither a file nor one of {', '.join(known)}"
            f"{did_you_mean(name_or_path, known)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed.config: {path} must hold one JSON object")
    return find_deepspeed_paths(config, f"{path}: ")


def written_ds_config(spec: DeepSpeedSpec) -> dict[str, Any]:
    """The file with the recipe's overrides, as they are written: `"auto"` still stands. Raises `UserError`."""
    return merge_mappings(load_ds_config(spec.config), spec.overrides)


def bucket_sizes(hidden_size: int) -> dict[str, int]:
    """Elements that `"auto"` stands for, by key of `zero_optimization`.

    One bucket holds a square weight; prefetch a little less; norms and biases are not partitioned.
    """
    square = hidden_size * hidden_size
    return {
        "reduce_bucket_size": max(square, 1_000_000),
        "allgather_bucket_size": max(square, 1_000_000),
        "stage3_prefetch_bucket_size": max(int(0.9 * square), 1_000_000),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
