"""Runs one after the other on this machine: a line of progress for each, and in logs what they print. No torch here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bico_ds.cluster.local.forecast import Forecast, LocalRun, Watch
from bico_ds.cluster.local.launch import STOPPING, Launch, exit_code_in, last_words, new_log, stop
from bico_ds.common.progress import Progress
from bico_ds.runtime.run_folder import read_state

_POLL_SECONDS = 0.5


def train_in_turn(runs: Sequence[LocalRun], environment: Mapping[str, str], console: Console) -> int:
    """Train one run after the other, until one fails; return 0, or the exit code of that one, whose error is shown.

    What the launcher and the ranks of a start print goes to a new launch-N.log in the `logs` of the run folder. Raises
    `UserError` where none can be made there. Ctrl-C ends the run in good order; then `KeyboardInterrupt` is raised.
    """
    forecast = Forecast()
    for number, run in enumerate(runs):
        turn = _Turn(f"{run.name} ({number + 1} of {len(runs)})", run, runs[number + 1 :], forecast)
        if code := turn.train(environment, console):
            return code
    return 0


@dataclass
class _Turn:
    """The training of one run, with what follows it."""

    title: str
    run: LocalRun
    later: Sequence[LocalRun]
    forecast: Forecast

    def train(self, environment: Mapping[str, str], console: Console) -> int:
        """Returns the exit code; 1 for a start that ended well and did not finish the run."""
        recorded = read_state(self.run.folder.state_file) or {}
        watch = Watch(self.run, began=time.monotonic(), before=recorded.get("run_id"))
        was_done = recorded.get("state") == "done" and self.run.steps_left() == 0
        log = new_log(self.run.folder, chosen_by="--runs")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with log, Progress(console, *columns) as progress:
            progress.begin(self.title, total=self.run.steps)
            progress.update(
                0, f"{self.title}: starting; its output: {log.name}", text="starting", at_once=True
            )
            code = _launch(self.run.command, environment, log, lambda: self._show(watch, progress))
            self.forecast.learn(watch, ended=time.monotonic())
            if code := exit_code_in(self.run.folder, code):
                return self._fail(code, watch, progress, Path(log.name))
            took = "was done before" if was_done else f"done in {about(time.monotonic() - watch.began)}"
            progress.update(self.run.steps or watch.step, f"{self.title}: {took}", text=took, at_once=True)
            return 0

    def _show(self, watch: Watch, progress: Progress) -> None:
        now = time.monotonic()
        watch.look(now)
        self.forecast.learn(watch)
        left = self._time_left(watch, now)
        if watch.last is not None or left:  # else there is nothing to say but that it starts, which is said
            step = f"step {watch.step} of {self.run.steps or '?'}" if watch.last is not None else "starting"
            progress.update(watch.step, f"{self.title}: {step}{left and ', '}{left}", text=left)

    def _time_left(self, watch: Watch, now: float) -> str:
        """In words, of this run and of all; empty where it is not known yet."""
        own, others = self.forecast.of_run(watch, now), self.forecast.of_later(self.later)
        if own is None or others is None:
            return ""
        return f"{about(own)} left" + (f", all in {about(own + others)}" if self.later else "")

    def _fail(self, code: int, watch: Watch, progress: Progress, log: Path) -> int:
        """Say it on stderr, with what the run said last; returns the exit code."""
        progress.update(watch.step, f"{self.title}: failed", text="failed", at_once=True)
        progress.stop()
        error = "\n".join(last_words(log, self.run.folder))
        print(
            f"error: {self.run.name} ended with exit code {code}; all of its output: {log}\n{error}",
            file=sys.stderr,
        )
        return code


def about(seconds: float) -> str:
    """A time as a person says it, no more exact than it is known."""
    if seconds < 100:
        return f"{max(5 * round(seconds / 5), 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _launch(
    command: Sequence[str], environment: Mapping[str, str], log: BinaryIO, on_poll: Callable[[], None]
) -> int:
    """Run a command, with its output in `log`, and call `on_poll` meanwhile; return its exit code.

    After Ctrl-C its descendants, which have got it from the terminal, too, are given time to save.
    """
    launch = Launch(command, environment, log)
    try:
        while (code := launch.wait(_POLL_SECONDS)) is None:
            on_poll()
        return code
    except BaseException as ended:
        if isinstance(ended, KeyboardInterrupt):
            print(STOPPING, file=sys.stderr)
        stop([launch])
        raise
