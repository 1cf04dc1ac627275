"""What every part of a run knows about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bico_ds.attention.layout import LayoutPolicy
from bico_ds.config.schema import Recipe
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.output.process_output import ProcessOutput
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag


@dataclass(frozen=True, kw_only=True)
class Run:
    """One start of one recipe, on one rank."""

    recipe: Recipe
    ranks: Ranks
    folder: RunFolder
    stop: StopFlag
    ds_config: dict[str, Any]  # complete, with paths as they are on this machine
    layout_policy: LayoutPolicy | None  # of the attention backend; the oracle has none
    output: ProcessOutput = field(default_factory=ProcessOutput)
