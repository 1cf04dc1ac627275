"""Where a step of a recipe goes on this machine: a few steps of a training that leaves no run. No torch here."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bico_ds.common.errors import RunError, UserError
from bico_ds.training.profile.request import MOST_STEPS
from bico_ds.training.profile.table import Profile, read_profile

MOST_RECORDED = MOST_STEPS
_LOOKS_EVERY_SECONDS = 0.2
_TOLD_LINES = 20

# What a step does not need, and what would keep a short training from its end; times do not depend on these.
_OVERRIDES = (
    "evaluation.tasks=[]",
    "checkpoint.every_steps=null",
    "checkpoint.export=false",
    "monitor.tensorboard=false",
    "monitor.csv=false",
    "monitor.wandb=null",
    "training.epochs=null",
    "training.epochs_of=null",
    "training.on_spike=warn",
    "training.on_nonfinite=skip",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=null",
    "schedule.min_lr_ratio=0",
)


def short_overrides(overrides: Sequence[str], *, steps: int) -> list[str]:
    """Those of the training that records `steps` steps of a recipe with these."""
    return [*overrides, *_OVERRIDES, f"training.steps={2 * steps + 1}"]


def profile_recipe(program: Sequence[str], recipe: str, overrides: Sequence[str], *, steps: int) -> Profile:
    """Train `recipe` in a temporary folder, and record `steps` steps, at most `MOST_RECORDED`, after as many others.

    `program`: the words of the command that trains. It is ended as soon as the profile is complete, so that no checkpoint
    is written. Raises `UserError` or `RunError` with what the training said where it ended before.
    """
    given = short_overrides(overrides, steps=steps)
    words = [*program, "--recipe", recipe, *(word for override in given for word in ("--set", override))]
    with tempfile.TemporaryDirectory(prefix="bico_ds-explain-", ignore_cleanup_errors=True) as temporary:
        run, log = Path(temporary, "run"), Path(temporary, "log")
        words += ["--output-dir", str(run), "--profile", f"{steps + 1}:{steps}"]
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
        try:
            while process.poll() is None and _recorded(run) < steps:
                time.sleep(_LOOKS_EVERY_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher with its ranks
                process.wait()
        if not _recorded(run):
            raise _failure(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
        return read_profile(run)


def _recorded(run: Path) -> int:
    try:
        return sum(len(table.steps) for table in read_profile(run).tables)
    except UserError:
        return 0


def _failure(code: int, output: str) -> UserError | RunError:
    """What the user reads of a training that ended before its profile."""
    lines = output.splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told and code == UserError.exit_code:
        return UserError(told[-1])
    return RunError("\n".join(["the training ended before its profile:", *(told or lines[-_TOLD_LINES:])]))
