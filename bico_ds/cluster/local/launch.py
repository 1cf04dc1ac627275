"""A launcher of ranks on this machine: its log, its end, and what it said last. No torch here."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import words_without_secrets
from bico_ds.runtime.run_folder import LAUNCH_LOG, RunFolder, obstacle, read_state

STOPPING = "\nstopping: a run that trains saves first, and the same command goes on from there"
_SECONDS_TO_SAVE = 60.0  # of ranks that were interrupted
_TAIL_BYTES, _MOST_LINES, _MOST_CHARACTERS = 1 << 16, 15, 1000  # of a log, that are shown


class Launch:
    """A launcher at work; what it and its ranks print goes to `log`, below the command."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> None:
        log.write(f"$ {shlex.join(words_without_secrets(list(command)))}\n".encode(errors="replace"))
        log.flush()
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        self.family: list[psutil.Process] = []
        """Its descendants, as the last `wait` found them."""

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it has not ended after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=seconds)
        with contextlib.suppress(psutil.Error):
            self.family = psutil.Process(self.process.pid).children(recursive=True)
        return None


def stop(launches: Sequence[Launch]) -> None:
    """End launchers, and give their ranks time to save: they stop in good order when the launching command is gone."""
    for launch in launches:  # as `subprocess.run` does
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.process.wait(timeout=0.25)
        launch.process.kill()
        launch.process.wait()
    psutil.wait_procs([rank for launch in launches for rank in launch.family], timeout=_SECONDS_TO_SAVE)


def exit_code_in(folder: RunFolder, code: int) -> int:
    """The exit code of a run whose launcher ended with `code`: 1 where it was 0, and the folder tells another end than
    `done`.
    """
    state = read_state(folder.state_file)
    return code or int(state is not None and state.get("state") != "done")


def new_log(folder: RunFolder, *, chosen_by: str) -> BinaryIO:
    """A file of its own for each start: nothing is overwritten.

    Raises `UserError`, which names the option that the folder was `chosen_by`.
    """
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        numbers = (number for number, _ in LAUNCH_LOG.in_folder(folder.logs))
        return open(folder.logs / LAUNCH_LOG.of(1 + max(numbers, default=0)), "xb")
    except OSError as error:
        why = obstacle(Path(error.filename or folder.path), error)
        raise UserError(
            f"cannot write into '{folder.logs}': {why}; choose another folder with {chosen_by}"
        ) from None


def last_words(log: Path, folder: RunFolder) -> list[str]:
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
