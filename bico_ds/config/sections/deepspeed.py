"""The recipe's keys of DeepSpeed's own configuration, and the paths in such a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_serializer, field_validator

from bico_ds.config.paths import LocalPath, replace_paths
from bico_ds.config.section import Section

# `output_file` is that of flops_profiler.
_DEEPSPEED_PATHS = frozenset({"nvme_path", "output_file"})


def find_deepspeed_paths(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration, its paths as `LocalPath`; `where` comes before their keys in errors.

    The keys `nvme_path` and `output_file` of any section have paths; `""` and `"auto"` are none.
    """
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = find_deepspeed_paths(value, f"{where}{key}.")
        elif key in _DEEPSPEED_PATHS and isinstance(value, str) and value not in ("", "auto"):
            value = LocalPath(value, where=f"{where}{key}")
        found[key] = value
    return found


class DeepSpeedSpec(Section):
    """A file of ds_configs/, and what this run changes in it."""

    config: LocalPath = Field(
        LocalPath("zero3_bf16"),
        description="name in ds_configs/, or a path to a DeepSpeed JSON",
        examples=["zero2_bf16"],
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of DeepSpeed's own configuration, merged over that file, key by key",
        examples=[{"zero_optimization": {"overlap_comm": False}}],
    )

    @field_validator("overrides")
    @classmethod
    def _paths_in_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        return find_deepspeed_paths(overrides, "deepspeed.overrides.")

    @field_serializer("overrides")
    def _overrides_as_written(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return replace_paths(overrides, str)
