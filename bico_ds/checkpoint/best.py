"""The checkpoint at which an evaluation found the model best (`checkpoint.keep_best`): which one it is, and its record.

What is best after a step follows from what its checkpoint records as best, and from that step's evaluation. So a run that
goes on from a checkpoint has the same best as one that was never interrupted, whenever it was killed; the record in the run
folder, which people and `bico-ds export` read, is written anew by every start.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bico_ds.checkpoint import manifest
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, is_number, read_object
from bico_ds.config.sections.keep_best import KeepBestSpec
from bico_ds.runtime.distributed import Ranks, broadcast_object
from bico_ds.runtime.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best evaluated step so far, by this metric; `mode`: whether it is the largest value, or the least."""

    step: int
    metric: str
    mode: str
    value: float

    def path(self, folder: RunFolder) -> Path:
        """Its checkpoint in the run folder."""
        return folder.checkpoints / manifest.name_of(self.step)

    def __str__(self) -> str:
        return f"step {self.step:,}, {self.metric} {self.value:.4g} ({self.mode})"


class BestKeeper:
    """Which checkpoint of a run is the best, the same on every rank; without `spec` none is.

    `saved`: what the checkpoint that the run goes on from records of it, as `state` returns it. `measured_on`: a digest of
    what the metric is measured on; values compare where it is equal, or not recorded.
    """

    def __init__(
        self,
        spec: KeepBestSpec | None,
        folder: RunFolder,
        ranks: Ranks,
        *,
        saved: Mapping[str, Any] | None = None,
        measured_on: str | None = None,
    ) -> None:
        self._spec, self._folder, self._ranks = spec, folder, ranks
        self._saved = _known(saved) if saved else None
        self._measured_on = measured_on
        self.is_remeasured = _differ(saved, spec, measured_on)
        self.best: BestCheckpoint | None = None
        self._recorded: BestCheckpoint | None = None

    def begin(self) -> str | None:
        """Take over what the checkpoint recorded, and bring the run folder's record up to it. Collective.

        Returns what to say where that best is not one any more: another metric decides now, or its checkpoint is gone.
        """
        saved, lost = self._saved, None
        if self._spec is None:
            saved = None
        elif saved is not None and (saved.metric, saved.mode) != (self._spec.metric, self._spec.mode):
            saved, lost = (
                None,
                f"the best so far was {saved}; checkpoint.keep_best goes by {self._spec.metric} now",
            )
        elif saved is not None and self.is_remeasured:
            saved, lost = None, f"the best so far was {saved}; what this is measured on was changed since"
        elif saved is not None and not self.has(saved.step):
            saved, lost = None, f"the best so far was {saved}, and its checkpoint is not here any more"
        self.best = saved
        failure = self._write()
        if failure is not None:
            return f"WARNING: {failure}"
        return None if lost is None else f"{lost}: the best is looked for from here on"

    def better(self, step: int, numbers: Mapping[str, float]) -> BestCheckpoint | None:
        """This step, where the numbers of its evaluation are better than the best so far.

        `numbers`: by their keys in metrics.jsonl. What is no finite number is never better. Of equal ones the earlier
        is, but of scores of 0 the later: where nothing is answered yet, the model that was trained least is not the best.
        """
        if self._spec is None:
            return None
        value = numbers.get(f"evaluation/{self._spec.metric}", math.nan)
        if not math.isfinite(value):
            return None
        if self.best is not None:
            gain = value - self.best.value
            is_nothing_yet = self._spec.mode == "max" and value == self.best.value == 0
            if not is_nothing_yet and not (gain > 0 if self._spec.mode == "max" else gain < 0):
                return None
        return BestCheckpoint(step=step, metric=self._spec.metric, mode=self._spec.mode, value=float(value))

    def has(self, step: int) -> bool:
        """Whether the run folder has a complete checkpoint of this step. Collective."""
        path = self._folder.checkpoints / manifest.name_of(step)
        return bool(broadcast_object(self._ranks.is_first and path in manifest.sealed_in(path.parent)))

    @property
    def kept_steps(self) -> set[int]:
        """On rank 0: whose checkpoints must stay, the best one's, and that of a record which could not be replaced."""
        return {kept.step for kept in (self.best, self._recorded) if kept is not None}

    def keep(self, best: BestCheckpoint) -> str | None:
        """Make it the best, once its checkpoint is there. Collective. Returns why the record could not be written.

        Raises `FencedError` on rank 0 alone, as `Checkpointer.save` does.
        """
        self.best = best
        return self._write()

    def state(self, best: BestCheckpoint | None = None) -> dict[str, Any] | None:
        """What a checkpoint keeps, JSON-able; `best`: what will be the best once it is written."""
        chosen = best or self.best
        values = {} if chosen is None else asdict(chosen)
        if self._spec is not None and self._measured_on is not None:
            values |= {"metric": self._spec.metric, "measured_on": self._measured_on}
        return values or None

    def _write(self) -> str | None:
        failure = None
        if self._ranks.is_first:
            self._folder.lock.check()
            try:
                write(self._folder, self.best)
            except OSError as error:
                failure = f"{error.filename or self._folder.best_checkpoint_file}: {error.strerror}"
            else:
                self._recorded = self.best
        return broadcast_object(failure)


def write(folder: RunFolder, best: BestCheckpoint | None) -> None:
    """Record the best checkpoint, and name it in checkpoints/best; None: there is none. Raises OSError."""
    name = folder.checkpoints / "best"
    if best is None:
        folder.best_checkpoint_file.unlink(missing_ok=True)
        if name.is_file() or name.is_symlink():
            name.unlink()
        return
    write_atomically(folder.best_checkpoint_file, json.dumps(asdict(best)) + "\n")
    if name.is_dir():
        name.rename(folder.new_aside() / name.name)
    write_atomically(name, manifest.name_of(best.step) + "\n")


def read(folder: RunFolder) -> BestCheckpoint | None:
    """What `write` recorded; None where the run keeps no best checkpoint. Raises `UserError` for a damaged record."""
    try:
        values = read_object(folder.best_checkpoint_file)
    except JsonError as error:
        if error.is_missing and not os.path.lexists(folder.best_checkpoint_file):
            return None
        raise UserError(f"{folder.best_checkpoint_file}: damaged ({error.reason})") from None
    best = _known(values)
    if best is None:
        raise UserError(f"{folder.best_checkpoint_file}: damaged: no record as a run writes it")
    return best


def _differ(saved: Mapping[str, Any] | None, spec: KeepBestSpec | None, measured_on: str | None) -> bool:
    """Whether the same metric was measured on something else when the checkpoint was written."""
    if not saved or spec is None or saved.get("metric") != spec.metric:
        return False
    before = saved.get("measured_on")
    return before is not None and measured_on is not None and before != measured_on


def _known(values: Mapping[str, Any]) -> BestCheckpoint | None:
    """The record with these values; None where they are of other types."""
    step, metric, mode, value = (values.get(key) for key in ("step", "metric", "mode", "value"))
    if type(step) is not int or step < 0 or value is None or not is_number(value):
        return None
    if not isinstance(metric, str) or not metric.isprintable() or not isinstance(mode, str):
        return None
    if mode not in ("max", "min"):
        return None
    return BestCheckpoint(step=step, metric=metric, mode=mode, value=float(value))
