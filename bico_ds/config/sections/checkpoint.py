"""The recipe's keys of checkpoints and of the export at the end."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bico_ds.config.section import PositiveInt, Section, Steps
from bico_ds.config.sections.keep_best import KeepBestSpec


class CheckpointSpec(Section):
    """When checkpoints are written, and which of them are kept."""

    every_steps: Steps | None = Field(
        None, description="a checkpoint every so many steps; null: only at the end", examples=[500]
    )
    keep_last: PositiveInt = Field(
        2, description="the newest checkpoints that stay; older ones are deleted", examples=[3]
    )
    keep_every_steps: Steps | None = Field(
        None, description="checkpoints at multiples of this step are never deleted", examples=[5000]
    )
    keep_best: KeepBestSpec | None = Field(
        None,
        description="keep the checkpoint that an evaluation found best, besides the last ones, and export it; null: the end "
        "is exported",
        examples=[{"metric": "company_backward/headline", "mode": "max"}],
    )
    on_write_error: Literal["continue", "stop"] = Field(
        "continue",
        description="where a checkpoint during training cannot be written: go on without it, or stop",
    )
    export: bool = Field(
        True,
        description="write RUN/export at the end: the model as a safetensors folder; of a LoRA run its adapters, for peft",
    )
    merge_adapters: bool = Field(
        False,
        description="let the export of a LoRA run be the whole model, its adapters merged into the base; where the base is "
        "random weights it always is",
    )
