"""Runs one after the other on this machine: a line of progress for each, and in logs what they print. No torch here."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bico_ds.cluster.local.forecast import Forecast, LocalRun, Watch
from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.common.progress import Progress
from bico_ds.common.secrets import words_without_secrets
from bico_ds.runtime.run_folder import LAUNCH_LOG, RunFolder, obstacle, read_state

_POLL_SECONDS = 0.5
_SECONDS_TO_SAVE = 60.0  # of ranks that were interrupted
_TAIL_BYTES, _MOST_LINES, _MOST_CHARACTERS = 1 << 16, 15, 1000  # of a log, that are shown


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
        log = _new_log(self.run.folder)
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
            if code := code or self._unfinished():
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

    def _unfinished(self) -> int:
        """1 for a run that records another end than `done`, although its launcher has none to tell."""
        state = read_state(self.run.folder.state_file)
        return int(state is not None and state.get("state") != "done")

    def _fail(self, code: int, watch: Watch, progress: Progress, log: Path) -> int:
        """Say it on stderr, with what the run said last; returns the exit code."""
        progress.update(watch.step, f"{self.title}: failed", text="failed", at_once=True)
        progress.stop()
        error = "\n".join(_last_words(log, self.run.folder))
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


def _new_log(folder: RunFolder) -> BinaryIO:
    """A file of its own for each start: nothing is overwritten. Raises `UserError`."""
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        numbers = (number for number, _ in LAUNCH_LOG.in_folder(folder.logs))
        return open(folder.logs / LAUNCH_LOG.of(1 + max(numbers, default=0)), "xb")
    except OSError as error:
        why = obstacle(Path(error.filename or folder.path), error)
        raise UserError(
            f"cannot write into '{folder.logs}': {why}; choose another folder with --runs"
        ) from None


def _launch(
    command: Sequence[str], environment: Mapping[str, str], log: BinaryIO, on_poll: Callable[[], None]
) -> int:
    """Run a command, with its output in `log`, and call `on_poll` meanwhile; return its exit code.

    After Ctrl-C its descendants, which have got it from the terminal, too, are given time to save.
    """
    log.write(f"$ {shlex.join(words_without_secrets(list(command)))}\n".encode(errors="replace"))
    log.flush()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    family: list[psutil.Process] = []
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=_POLL_SECONDS)
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(process.pid).children(recursive=True)
            on_poll()
    except BaseException as ended:
        if isinstance(ended, KeyboardInterrupt):
            print(
                "\nstopping: a run that trains saves first, and the same command goes on from there",
                file=sys.stderr,
            )
        # As `subprocess.run` does: ranks stop in good order when the launching command is gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.25)
        process.kill()
        process.wait()
        psutil.wait_procs(family, timeout=_SECONDS_TO_SAVE)
        raise


def _last_words(log: Path, folder: RunFolder) -> list[str]:
    """The error of a run, as its log ends or its state says, or the log's last lines: text of unknown origin, made fit."""
    try:
        with open(log, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return [f"(the log cannot be read: {error.strerror})"]
    lines = [on_one_line(line, most=_MOST_CHARACTERS) for line in lines if line.strip()]
    own = [
        line for line in lines if not line.startswith("[20")
    ]  # without DeepSpeed's, which begin with the time
    starts = [number for number, line in enumerate(own) if line.startswith("error: ")]
    if starts:
        return own[starts[-1] :][:_MOST_LINES]
    state = read_state(folder.state_file) or {}
    if reason := state.get("reason"):
        own.append(f"{state.get('state', 'it ended')}: {on_one_line(reason, most=_MOST_CHARACTERS)}")
    return own[-_MOST_LINES:]
