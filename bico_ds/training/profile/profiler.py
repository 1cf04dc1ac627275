"""Profiles chosen steps of a run: a trace from each rank, and a table over all of them of where these steps went.

Writes RUN/profile/step-N/, N the first of them: `trace-rank-R.json.gz`, which ui.perfetto.dev shows, `table.md` and
`table.json`, and on a GPU `memory-rank-R.pickle`, which pytorch.org/memory_viz shows. The steps between profiled ones, and
what comes between steps, are not recorded. What fails of this never ends the run.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from bico_ds.common.files import remove_incomplete, temporary_sibling, write_atomically
from bico_ds.common.numbered_names import NumberedName
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.runtime.distributed import Ranks, all_gather_objects
from bico_ds.training.callbacks.best_effort import reason_of
from bico_ds.training.profile.partition import seconds_by_part
from bico_ds.training.profile.recording import StepRecording
from bico_ds.training.profile.table import (
    MARKDOWN,
    STEP_FOLDER,
    TABLE,
    RankStep,
    as_json,
    as_markdown,
    profile_of,
)
from bico_ds.training.profile.trace_file import TraceFile

_logger = logging.getLogger(__name__)

_FAILURES = (OSError, RuntimeError, ValueError)
_TRACE, _MEMORY = NumberedName("trace-rank-", ".json.gz"), NumberedName("memory-rank-", ".pickle")
_ORDINARY_STEPS = 50  # of an objective, the last ones, of which `ordinary` is the median
_HOW_TO_READ = {
    "cpu": "ui.perfetto.dev shows them",
    "cuda": "ui.perfetto.dev shows them, and pytorch.org/memory_viz the memory-rank-*.pickle beside them",
}
_MEMORY_EVENTS = 1_000_000  # of a memory snapshot, the last ones


class StepProfiler:
    """Records the steps of the numbers `steps`, which count from 1; the same calls on every rank.

    `folder`: the run's for profiles. `tell` shows a text to the user; rank 0 calls it.
    """

    def __init__(self, steps: Sequence[int], ranks: Ranks, folder: Path, tell: Callable[[str], None]) -> None:
        self._steps, self._ranks, self._tell = frozenset(steps), ranks, tell
        self._last = max(steps)
        self._folder = folder / STEP_FOLDER.of(min(steps))
        self._trace = TraceFile(self._folder / _TRACE.of(ranks.rank))
        self._ordinary: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_ORDINARY_STEPS))
        self._recording: StepRecording | None = None
        self._failure: Exception | None = None  # why this rank does not record the step
        self._found: list[list[RankStep]] = []
        self._is_warm = False

    def begin(self, step: int) -> bool:
        """This step is about to begin; returns whether it is to be recorded. Collective then."""
        if step not in self._steps:
            return False
        self._failure = _failure_of(self._start)
        dist.barrier()  # or a rank's waiting for others that start their profilers would be the step's
        if self._recording is not None:
            self.settle()
            self._recording.begin(step)
        return True

    def settle(self) -> None:
        """Have a recorded step end when the device has done it, and not when the host has."""
        if self._recording is not None and self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)

    def end(self, step: int, objective: str, seconds: float) -> bool:
        """This step took `seconds` and is over; returns whether it was to be recorded. Collective then."""
        if step not in self._steps:
            self._ordinary[objective].append(seconds)
            return False
        of_ranks = all_gather_objects(self._found_or_why_not(step, objective, seconds))
        if self._ranks.is_first:
            self._take(step, of_ranks)
        if step == self._last:
            self.close()
        return True

    def close(self) -> None:
        """Complete this rank's files and show the table, after the last step to record or where the run ends before it."""
        recording, self._recording = self._recording, None
        if recording is not None:
            _warn_of(recording.stop)
        _warn_of(self._close_files)
        if self._found:
            table = as_markdown(profile_of(self._found, device=self._ranks.device.type))
            self._tell(f"{table}\nthe traces lie in {self._folder}; {_HOW_TO_READ[self._ranks.device.type]}")
            self._found = []

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._is_warm:
            self._is_warm = True
            if self._ranks.is_first:  # while the others wait for it, in `begin`
                self._remove_former()
            once = StepRecording(self._ranks.device)  # what the first one loads must not be a step's
            once.start()
            once.stop()
            if self._ranks.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        recording = StepRecording(self._ranks.device)
        recording.start()
        self._recording = recording

    def _remove_former(self) -> None:
        """What an earlier start left of a profile that begins at the same step, maybe with more ranks than this one has."""
        remove_incomplete(self._folder, "*-rank-*.json*")
        former = [path for name in (_TRACE, _MEMORY) for _, path in name.in_folder(self._folder)]
        for path in (*former, self._folder / TABLE, self._folder / MARKDOWN):
            path.unlink(missing_ok=True)

    def _found_or_why_not(self, step: int, objective: str, seconds: float) -> RankStep | str:
        """Stop the recording, and add it to the trace."""
        try:
            if self._recording is None:
                raise self._failure or RuntimeError("nothing was recorded")
            recording, self._recording = self._recording, None
            recording.stop()
            parts = self._parts_of(recording, step)
        except _FAILURES as error:
            return reason_of(error)
        known = self._ordinary.get(objective)
        ordinary = statistics.median(known) if known else None
        return RankStep(objective=objective, step=step, seconds=seconds, ordinary=ordinary, parts=parts)

    def _parts_of(self, recording: StepRecording, step: int) -> dict[StepPart, float]:
        """Seconds by part, once the recording is in the trace. Raises one of `_FAILURES`."""
        path = temporary_sibling(self._folder / f"step-{step}-rank-{self._ranks.rank}.json")
        try:
            recording.write(path)
            trace = json.loads(path.read_bytes())
        finally:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)  # torch's, of which it makes `path`
        parts = seconds_by_part(trace["traceEvents"], on_cuda=self._ranks.device.type == "cuda")
        self._trace.add(trace)
        return parts

    def _take(self, step: int, of_ranks: Sequence[RankStep | str]) -> None:
        """On rank 0: one step more in the table, unless a rank could not record it."""
        failed = next((entry for entry in enumerate(of_ranks) if isinstance(entry[1], str)), None)
        if failed is not None:
            rank, reason = failed
            self._tell(f"WARNING: step {step} is not in the profile: rank {rank}: {reason}; training goes on")
            return
        self._found.append([found for found in of_ranks if isinstance(found, RankStep)])
        profile = profile_of(self._found, device=self._ranks.device.type)
        for name, content in ((TABLE, as_json(profile)), (MARKDOWN, as_markdown(profile))):
            _warn_of(partial(write_atomically, self._folder / name, content))

    def _close_files(self) -> None:
        self._trace.close()
        if self._is_warm and self._ranks.device.type == "cuda":
            self._is_warm = False
            torch.cuda.memory._dump_snapshot(str(self._folder / _MEMORY.of(self._ranks.rank)))
            torch.cuda.memory._record_memory_history(enabled=None)


def _failure_of(work: Callable[[], object]) -> Exception | None:
    """Why it failed; None: it did not."""
    try:
        work()
    except _FAILURES as error:
        return error
    return None


def _warn_of(work: Callable[[], object]) -> None:
    """No profile is worth a run: what fails is told."""
    if (failure := _failure_of(work)) is not None:
        _logger.warning("WARNING: a part of the profile is missing: %s; training goes on", reason_of(failure))
