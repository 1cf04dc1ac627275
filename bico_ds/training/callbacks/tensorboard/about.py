"""What TensorBoard shows once of a run, not of a step: settings, recipe, data, versions. Rank 0 only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.common.appended_file import AppendedFile
from bico_ds.common.json_files import JsonError
from bico_ds.runtime.run_folder import RunFolder, read_starts
from bico_ds.training.callbacks.base import RunStart
from bico_ds.training.callbacks.tensorboard.event_file import TAGS, record, version
from bico_ds.training.callbacks.tensorboard.hyperparameters import session_end, session_start
from bico_ds.training.callbacks.tensorboard.tags import DATA, DETAILS
from bico_ds.training.callbacks.tensorboard.texts import data_text, recipe_text, text_value, versions_text

# The name of an event file that sorts before those of steps: TensorBoard reads one after the other.
NAME = f"events.out.tfevents.0000000000.about{TAGS}"


class About:
    """One event file per run, in the place of that of the start before: nothing in it is there twice. `charts`: a layout."""

    def __init__(self, folder: RunFolder, start: RunStart, charts: Summary) -> None:
        now = time.time()
        head = [version(), Event(wall_time=now, summary=charts)]
        head += [
            Event(wall_time=now, summary=Summary(value=[value])) for value in _values(folder, start, now)
        ]
        self._file = AppendedFile(
            folder.tensorboard / NAME, root=folder.path, head=b"".join(map(record, head))
        )
        self._is_begun = False

    def write(self) -> None:
        """Write the file, at first in the place of the earlier one, and again where it was removed. Raises OSError."""
        if not self._is_begun:
            self._file.path.unlink(missing_ok=True)
            self._is_begun = True
        if not os.path.exists(self._file.path):  # asked each time that the board is written
            self._file.add(b"")
        self._file.write_waiting()

    def end(self) -> None:
        """Let it be written that the run is done."""
        now = time.time()
        self._file.add(record(Event(wall_time=now, summary=Summary(value=[session_end(seconds=now)]))))


def _values(folder: RunFolder, start: RunStart, now: float) -> Iterator[Summary.Value]:
    yield session_start(start.recipe, seconds=now)
    yield text_value(f"{DETAILS}/recipe", recipe_text(start.recipe))
    if streams := start.summary.get("data"):
        yield text_value(f"{DATA}/streams", data_text(streams))
    if this := _this_start(folder):
        yield text_value(f"{DETAILS}/versions", versions_text(this))


def _this_start(folder: RunFolder) -> Mapping[str, Any]:
    """What run.json says of this start, as far as it can be read."""
    try:
        return next(reversed(read_starts(folder.run_file)), {})
    except JsonError:
        return {}
