"""Checkpoint files on disk: a failure to write them is kept for all ranks to know, and their room is known before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.materialize import full_numel
from bico_ds.optim.table import kind_running

_SPARE = 1.05  # tables and headers


class PatientWriter(TorchCheckpointEngine):
    """DeepSpeed's writer that keeps the first failure instead of raising it, and the names of the files it has written.

    DeepSpeed's save has barriers between its files: a rank that raised would leave the others waiting in them. Were the
    files looked up in the folder instead, every rank would list those of all ranks, and on NFS might not see them all.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.failure: str | None = None
        self.written: list[Path] = []

    def save(self, state_dict: Any, path: str) -> None:
        if self.failure is None:
            try:
                super().save(state_dict, path)
                self.written.append(Path(path))
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                self.failure = f"{path}: {error}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or f"{path}: {error.strerror}"


def bytes_needed(engine: Engine) -> int:
    """Bytes that a checkpoint of this engine takes, over all ranks.

    Below stage 3 it holds the weights besides the optimizer's state; under stage 3 the master weights take their place.
    """
    state = kind_running(engine.optimizer.optimizer).spec.state.bytes_per_parameter
    partitioned = engine.zero_optimization_stage() == 3
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return int(
        _SPARE
        * sum(
            full_numel(parameter) * (state + (0 if partitioned else parameter.element_size()))
            for parameter in trained
        )
    )


def lack_of_room(folder: Path, needed: int) -> str | None:
    """A message where `needed` bytes do not fit into `folder`; None where they do."""
    free = shutil.disk_usage(folder).free
    return None if free >= needed else f"{folder}: {in_units(needed)} needed, {in_units(free)} free"


def in_units(size: float) -> str:
    """A number of bytes, readable."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
