"""A run in TensorBoard. Rank 0 only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

from bico_ds.common.appended_file import AppendedFile
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.tensorboard.about import About
from bico_ds.training.callbacks.tensorboard.event_file import EventFile
from bico_ds.training.callbacks.tensorboard.history import forget_after, renew
from bico_ds.training.callbacks.tensorboard.tags import tag_of, tagged
from bico_ds.training.callbacks.utilization import TAG as MFU

# Seconds. What a record takes is mostly to fetch code and tables that training has driven from the processor's caches: of
# those that are made together, each but the first takes a quarter (docs/benchmarks/watching.md).
_BETWEEN_WRITES = 1.0


class Board:
    """The event files of a run folder: each start adds one, which hides what earlier ones wrote after its `first_step`.

    `first_step`: the step that the run goes on from. `about`: what is there once. `mfu`: what the peak of MFU is, shown
    beside its charts. `tell` gets a line where files of a run begun before are replaced.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        first_step: int,
        about: About,
        mfu: str = "",
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._first_step, self._tell = folder, first_step, tell
        self._mfu = mfu
        self._described: set[str] = set()
        self._is_renewed = False  # the files of earlier starts: before the first record of this one
        self._about = about
        self._lines: list[tuple[float, int, str, Mapping[str, float]]] = []
        self._last_write = -math.inf
        # From TensorBoards that are open: hide what an earlier start wrote after the checkpoint resumed from.
        self._events = EventFile(folder.tensorboard, root=folder.path, first_step=first_step + 1)

    @property
    def file(self) -> AppendedFile:
        """The file of this start."""
        return self._events.file

    @property
    def is_due(self) -> bool:
        """Whether what waits has waited long enough; sooner it is written where training pauses."""
        return time.monotonic() - self._last_write >= _BETWEEN_WRITES

    def add(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        """Let the numbers of a line of metrics.jsonl wait, all in one record; `write_waiting` writes them."""
        self._lines.append((time.time(), step, kind, numbers))

    def show(self, step: int, values: Sequence[Summary.Value]) -> None:
        """Let other values of a step wait: pictures, texts."""
        self._make_records()
        self._events.add(Summary(value=values), step)

    def end(self) -> None:
        """Let it be written that the run is done."""
        self._about.end()

    def write_waiting(self) -> None:
        """Write what waits. Raises OSError; it then goes on waiting."""
        self._last_write = time.monotonic()
        self._make_records()
        if not self._is_renewed:
            until = self._first_step or -1  # a start from the beginning does step 0 anew
            renew(self._folder, until, self._scalars, self._tell)
            forget_after(self._folder, until)
            self._is_renewed = True
        self._about.write()
        self._events.file.write_waiting()

    def _make_records(self) -> None:
        for at, step, kind, numbers in self._lines:
            self._events.add(Summary(value=self._scalars(kind, numbers)), step, at=at)
        self._lines.clear()

    def _scalars(self, kind: str, numbers: Mapping[str, float]) -> list[Summary.Value]:
        return [self._scalar(tag, value) for tag, value in tagged(kind, numbers).items()]

    def _scalar(self, tag: str, value: float) -> Summary.Value:
        """As torch's `add_scalar` writes it; MFU with the description that TensorBoard takes from a tag's first value."""
        if not self._mfu or tag in self._described or not tag.startswith(tag_of(MFU)):
            return Summary.Value(tag=tag, simple_value=value)
        self._described.add(tag)
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(plugin_data=plugin, summary_description=self._mfu)
        return Summary.Value(tag=tag, simple_value=value, metadata=metadata)
