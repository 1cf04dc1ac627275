"""The run folder: its layout, its lock, its state file. No torch here, so that status tools start at once.

runs/NAME/
  recipe.yaml     the resolved recipe         tokenizer/   that of the run: an export needs nothing of the data
  run.json        versions, commit, command line of every start that began training; what it took, beside its plan
  lock.json       which run may write here
  state.json      running | preempted | done | failed, with step and reason
  metrics.jsonl   one line per logged step, evaluation and checkpoint
  evaluation/     step-N.json: every prompt with its answer and scores
  tensorboard/    checkpoints/    export/    logs/    csv/
  last_checkpoint.json   the newest checkpoint, also where checkpoints/ is gone
  replaced-N/     what a later start set aside
  slurm/          scripts, recipe and starts of the batch system; stop: a file that forbids to requeue the job
  native_ops/     compiled DeepSpeed operations, under a batch system

A start takes the lock first, and writes the rest only when nothing can refuse it any more: until then the folder holds the
record of the run before.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bico_ds import __version__
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.secrets import text_without_secrets, words_without_secrets
from bico_ds.config.load import dump_recipe
from bico_ds.config.resources import CHECKOUT
from bico_ds.config.schema import Recipe
from bico_ds.runtime.launch_environment import slurm_job
from bico_ds.runtime.lock import InUseError, RunLock

State = Literal["running", "preempted", "done", "failed"]


def folder_of_run(recipe: Recipe, chosen: Path | None) -> Path:
    """Where a run writes: the folder `chosen` on the command line, else the recipe's `output_dir`, else runs/NAME.

    Raises `UserError` where `output_dir` has a variable that is not set on this machine.
    """
    if chosen is not None:
        return chosen
    return recipe.output_dir.here() if recipe.output_dir is not None else Path("runs", recipe.name)


class RunFolder:
    """Paths of one run, and the right to write into them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = RunLock(self.path / "lock.json")

    recipe_file = property(lambda self: self.path / "recipe.yaml")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    last_checkpoint_file = property(lambda self: self.path / "last_checkpoint.json")
    state_file = property(lambda self: self.path / "state.json")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    export = property(lambda self: self.path / "export")
    logs = property(lambda self: self.path / "logs")
    tokenizer = property(lambda self: self.path / "tokenizer")
    evaluation = property(lambda self: self.path / "evaluation")
    csv = property(lambda self: self.path / "csv")

    def evaluation_file(self, step: int) -> Path:
        """Where the evaluation after so many steps is kept."""
        return self.evaluation / f"step-{step:06d}.json"

    def evaluations_after(self, step: int) -> list[Path]:
        """The kept evaluations of later steps."""
        found = sorted(self.evaluation.glob("step-*.json"))
        return [path for path in found if int(path.stem.removeprefix("step-")) > step]

    def open(self) -> None:
        """Create the folder and take the lock.

        Raises `UserError` where another run is alive in it, and where it cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True, mode=0o755)
            self.lock.take()
        except InUseError as error:
            holder = error.holder
            who = f"run {holder.run_id} (process {holder.pid} on {holder.host})" if holder else "another run"
            raise UserError(
                f"output_dir: '{self.path}' is in use by {who}; stop it first, or choose another folder with --output-dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write into '{self.path}': {obstacle(Path(error.filename or self.path), error)}; "
                "choose another with --output-dir"
            ) from None

    def check_writable(self, *, begins_anew: bool = False) -> None:
        """Raise `UserError` where a folder or file that is there already cannot be written: most are needed hours later.

        A start that `begins_anew` writes none of those that `set_aside` will move away.
        """
        if begins_anew and self._holds_a_run():
            return
        folders = [
            folder
            for folder in (self.checkpoints, self.logs, self.evaluation, self.tensorboard, self.csv)
            if os.path.lexists(folder)
        ]
        # These are replaced as a whole, by a new folder beside what the link names.
        folders += [link.resolve().parent for link in (self.export, self.tokenizer) if link.is_symlink()]
        for folder in folders:
            try:
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(bytes(4096))
            except OSError as error:
                raise UserError(
                    f"cannot write into '{folder}': {obstacle(folder, error)}; "
                    "put that right, or choose another folder with --output-dir"
                ) from None
        if os.path.lexists(self.metrics_file) and not self.metrics_file.is_file():
            raise UserError(f"'{self.metrics_file}' is no file; move it away")

    def record(self, recipe: Recipe) -> None:
        """Write the recipe, and this start's provenance, in the place of and after those of earlier ones."""
        write_atomically(self.recipe_file, dump_recipe(recipe))
        path = self.path / "run.json"
        starts = json.loads(path.read_text()) if path.is_file() else []
        start = {"run_id": self.lock.run_id, **provenance()}
        write_atomically(path, json.dumps([*starts, start], indent=1) + "\n")

    def add_to_start(self, **facts: Any) -> None:
        """Add facts to this start's part of run.json. Raises OSError."""
        path = self.path / "run.json"
        *earlier, last = json.loads(path.read_text())
        if last["run_id"] == self.lock.run_id:  # else another start has taken the folder over
            write_atomically(path, json.dumps([*earlier, last | facts], indent=1) + "\n")

    def write_state(self, state: State, *, step: int | None, reason: str = "", **facts: Any) -> None:
        """Write the state file that launchers decide by. Raises `FencedError` as `RunLock.check` does.

        `facts`: further ones of a failure (`bico_ds.runtime.nodes.failed_node`).
        """
        self.lock.check()
        content = {
            "state": state,
            "step": step,
            "reason": text_without_secrets(reason),
            "run_id": self.lock.run_id,
            "time": time.time(),
            **facts,
        }
        write_atomically(self.state_file, json.dumps(content) + "\n")

    def fail(self, reason: str, **facts: Any) -> None:
        """Record that the run failed; of a start that did not begin training only where no run was recorded before.

        Raises `FencedError` as `RunLock.check` does.
        """
        recorded = read_state(self.state_file) or {}
        if recorded.get("run_id") == self.lock.run_id or not self.recipe_file.is_file():
            self.write_state("failed", step=None, reason=reason, **facts)

    def preempt(self, reason: str) -> None:
        """Record that a start was stopped before it began training, unless the run was finished already.

        Raises `FencedError` as `RunLock.check` does.
        """
        recorded = read_state(self.state_file) or {}
        if recorded.get("state") != "done":
            self.write_state("preempted", step=recorded.get("step"), reason=reason)

    def set_aside(self) -> None:
        """Move what an earlier run left (recipe, checkpoints, metrics …) into replaced-N/: nothing of it is deleted."""
        if not self._holds_a_run():
            return
        kept = {self.lock.path.name, self.state_file.name, "run.json", "slurm", "stop", "native_ops"}
        old = [
            p for p in self.path.iterdir() if p.name not in kept and not p.name.startswith((".", "replaced-"))
        ]
        aside = self.new_aside()
        for path in old:
            path.rename(aside / path.name)
        self.logs.mkdir(exist_ok=True)

    def _holds_a_run(self) -> bool:
        left = (self.metrics_file.is_file(), self.last_checkpoint_file.is_file())
        return any(left) or any(self.checkpoints.glob("step-*"))

    def new_aside(self) -> Path:
        """Make the next replaced-N/."""
        numbers = (path.name.removeprefix("replaced-") for path in self.path.glob("replaced-*"))
        aside = self.path / f"replaced-{1 + max(map(int, filter(str.isdecimal, numbers)), default=0)}"
        aside.mkdir()
        return aside

    def close(self) -> None:
        """Give the lock back."""
        self.lock.release()


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the content of a state file, None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def split_metrics(path: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines of a metrics.jsonl up to a step, and those that a run which goes on from there writes again.

    A line that is no JSON (a crash cut it, a disk damaged it) is among the latter.
    """
    kept: list[str] = []
    later: list[str] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            (kept if _is_of_step_until(line, step) else later).append(line)
    return kept, later


def _is_of_step_until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, LookupError, TypeError):
        return False


def obstacle(folder: Path, error: OSError) -> str:
    """Why nothing can be written into a folder."""
    if folder.is_symlink() and not folder.exists():
        return f"it is a link to '{folder.readlink()}', which is not there"
    return "it is no folder" if folder.is_file() else str(error.strerror)


def provenance() -> dict[str, Any]:
    """Versions, commit, host and command line: what it takes to run the same again. No environment: it has secrets."""
    packages = (
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "peft",
        "flash-attn",
        "liger-kernel",
        "numpy",
    )
    versions = {"bico_ds": __version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": words_without_secrets(sys.argv),
        "host": socket.gethostname(),
        "job": slurm_job(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git_commit(),
    }


def _git_commit() -> str | None:
    if CHECKOUT is None:
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
