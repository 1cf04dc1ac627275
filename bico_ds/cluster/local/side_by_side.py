"""Runs side by side on this machine, some at a time: one that fails is noted, and the others go on. No torch here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bico_ds.cluster.local.forecast import Forecast, LocalRun, Watch
from bico_ds.cluster.local.in_turn import about
from bico_ds.cluster.local.launch import STOPPING, Launch, last_words, new_log, stop
from bico_ds.common.errors import UserError
from bico_ds.common.progress import Progress
from bico_ds.runtime.run_folder import read_state

_POLL_SECONDS = 0.5
_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=12),
    MofNCompleteColumn(),
    TextColumn("{task.fields[text]}", markup=False),
)

# The command that trains a run in one of the places, and its environment.
Started = tuple[Sequence[str], Mapping[str, str]]
Begin = Callable[[LocalRun, int], Started]


@dataclass(frozen=True)
class Failure:
    """A run that did not finish; `log` is None where it could not be started."""

    run: LocalRun
    log: Path | None
    lines: Sequence[str]


def train_side_by_side(
    runs: Sequence[LocalRun], *, places: int, begin: Begin, console: Console
) -> list[Failure]:
    """Train the runs in their order, `places` at a time; return those that failed, each of which was told on stderr.

    `begin` gives the command of a run in a place, from 0 on, when its turn has come. What a start prints goes to a
    launch-N.log in the `logs` of its run folder. Ctrl-C ends the runs in good order; then `KeyboardInterrupt` is raised.
    """
    steps = [run.steps_left() for run in runs]
    counts_runs = None in steps
    with Progress(console, *_COLUMNS) as progress:
        unit, total = ("runs", len(runs)) if counts_runs else ("steps", sum(left or 0 for left in steps))
        progress.begin(unit, total=total)
        work = _Work(runs, begin, progress, places, counts_runs)
        try:
            while work.goes_on():
                work.fill_places()
                work.look()
        except BaseException as ended:
            if isinstance(ended, KeyboardInterrupt):
                print(STOPPING, file=sys.stderr)
            work.stop()
            raise
        return work.failures


@dataclass(kw_only=True)
class _Place:
    """A run at work."""

    number: int
    title: str
    launch: Launch
    log: Path
    watch: Watch
    steps_before: int  # left when it began


class _Work:
    """The runs that wait, those at work, and what became of the others."""

    def __init__(
        self, runs: Sequence[LocalRun], begin: Begin, progress: Progress, places: int, counts_runs: bool
    ) -> None:
        self.failures: list[Failure] = []
        self._runs, self._begin, self._progress, self._counts_runs = list(runs), begin, progress, counts_runs
        self._next = 0
        self._free = list(range(places))
        self._busy: list[_Place] = []
        self._forecast = Forecast()
        self._steps_ended = 0  # of the runs that are over

    def goes_on(self) -> bool:
        return bool(self._busy) or self._next < len(self._runs)

    def fill_places(self) -> None:
        while self._free and self._next < len(self._runs):
            run = self._runs[self._next]
            self._next += 1
            title = f"{run.name} ({self._next} of {len(self._runs)})"
            try:
                place = self._start(run, title, self._free[0])
            except (UserError, OSError) as error:
                self._fail(Failure(run, None, [str(error)]), f"{title}: could not be started")
                self._steps_ended += run.steps_left() or 0
                continue
            self._free.pop(0)
            self._busy.append(place)
            self._progress.print(f"{title}: starting; its output: {place.log}")

    def _start(self, run: LocalRun, title: str, number: int) -> _Place:
        """Raises `UserError` where there can be no log, OSError where there is no such command."""
        before, left = read_state(run.folder.state_file) or {}, run.steps_left() or 0
        command, environment = self._begin(run, number)
        with new_log(run.folder, chosen_by="--output-dir") as log:  # the launcher has a descriptor of its own
            launch = Launch(command, environment, log)
        watch = Watch(run, began=time.monotonic(), before=before.get("run_id"))
        return _Place(
            number=number, title=title, launch=launch, log=Path(log.name), watch=watch, steps_before=left
        )

    def look(self) -> None:
        """See how far all are, and take those away that are over."""
        for place in list(self._busy):
            code = place.launch.wait(_POLL_SECONDS / len(self._busy))
            now = time.monotonic()
            place.watch.look(now)
            self._forecast.learn(place.watch, ended=None if code is None else now)
            if code is not None:
                self._end(place, code, now)
        self._show(time.monotonic())

    def _end(self, place: _Place, code: int, now: float) -> None:
        self._busy.remove(place)
        self._free.append(place.number)
        self._steps_ended += place.steps_before
        run = place.watch.run
        if code == 0 and (read_state(run.folder.state_file) or {}).get("state") == "done":
            self._progress.print(f"{place.title}: done in {about(now - place.watch.began)}")
            return
        lines = last_words(place.log, run.folder)
        ended = f"ended with exit code {code}" if code else "did not finish"
        failure = Failure(run, place.log, [f"{ended}; all of its output: {place.log}", *lines])
        self._fail(failure, f"{place.title}: failed; the others go on")

    def _fail(self, failure: Failure, line: str) -> None:
        self.failures.append(failure)
        self._progress.print(line)
        print(f"error: {failure.run.name}: " + "\n".join(failure.lines), file=sys.stderr)

    def _show(self, now: float) -> None:
        over, left, at = self._next - len(self._busy), self._time_left(now), self._positions()
        if not (over or at):
            return  # there is nothing to say but that they start, which is said
        words = [f"{over} of {len(self._runs)} over", f"{len(self._busy)} at work"]
        words += [f"{len(self.failures)} failed"] * bool(self.failures)
        words += [f"all in {about(left)}"] if left is not None else []
        text = ", ".join(words)
        completed = over if self._counts_runs else self._steps_ended + self._steps_at_work()
        self._progress.update(completed, f"{text}{at}", text=text)

    def _steps_at_work(self) -> int:
        """Steps that the runs at work have made since they began."""
        made = 0
        for place in self._busy:
            run = place.watch.run
            if place.watch.last is not None and run.steps is not None:
                made += max(place.steps_before - (run.steps - place.watch.step), 0)
        return made

    def _positions(self) -> str:
        """Of a plain line: how far each is that trains."""
        at = [
            f"{place.watch.run.name} at step {place.watch.step} of {place.watch.run.steps or '?'}"
            for place in self._busy
            if place.watch.last is not None
        ]
        return f": {'; '.join(at)}" if at else ""

    def _time_left(self, now: float) -> float | None:
        """Seconds until all are over, as if those that wait would divide over the places; None where it is not known."""
        at_work = [self._forecast.of_run(place.watch, now) for place in self._busy]
        later = self._forecast.of_later(self._runs[self._next :])
        known = [seconds for seconds in at_work if seconds is not None]
        if later is None or len(known) < len(at_work):
            return None
        return max([*known, (sum(known) + later) / (len(self._busy) + len(self._free))])

    def stop(self) -> None:
        """Give the runs at work time to save."""
        stop([place.launch for place in self._busy])
