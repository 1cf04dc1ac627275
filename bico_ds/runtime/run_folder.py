"""The run folder: its layout, its lock, its state file. No torch here, so that status tools start at once.

runs/NAME/
  recipe.yaml     the resolved recipe         tokenizer/   that of the run: an export needs nothing of the data
  run.json        versions, commit, command line of every start that began training; what it took, beside its plan
  lock.json       which run may write here
  state.json      running | preempted | done | failed, with step and reason
  metrics.jsonl   one line per logged step, evaluation and checkpoint
  evaluation/     step-N.json: every prompt with its answer and scores          report.html   what `bico-ds report` wrote
  tensorboard/    checkpoints/    export/    logs/    csv/
  profile/        step-N/: where the steps from N on went, as `--profile` asked
  last_checkpoint.json   the newest checkpoint, also where checkpoints/ is gone
  best_checkpoint.json   the step that `checkpoint.keep_best` keeps, its metric and value; checkpoints/best names its folder,
                  and export/ holds its weights
  replaced-N/     what a later start set aside
  slurm/          scripts, recipe and starts of the batch system; stop: a file that forbids to requeue the job
  native_ops/     compiled DeepSpeed operations, under a batch system or where no other folder can be written

A start takes the lock first, and writes the rest only when nothing can refuse it any more: until then the folder holds the
record of the run before.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from bico_ds.common.errors import UserError
from bico_ds.common.files import overwrite, remove_incomplete, write_atomically
from bico_ds.common.json_files import JsonError, is_number, object_in, parse_object, read_json, read_object
from bico_ds.common.numbered_names import NumberedName
from bico_ds.common.secrets import text_without_secrets
from bico_ds.config.load import dump_recipe
from bico_ds.config.schema import Recipe
from bico_ds.runtime.lock import FencedError, InUseError, RunLock
from bico_ds.runtime.nodes.failed_node import is_node_name
from bico_ds.runtime.provenance import provenance

_PATIENCE_SECONDS = 10.0  # that a state waits for a disk
_OVERWRITTEN_REASON = (
    300  # characters of a reason that is written in place, which must not need another block
)

# Process and thread that were killed while they wrote.
_TEMPORARY_OF_0_1_0 = re.compile(r"\.(state|run|lock)\.json\.\d+(\.\d+)?|\.recipe\.yaml\.\d+(\.\d+)?")

State = Literal["running", "preempted", "done", "failed"]

STEP = NumberedName("step-", digits=6)
EVALUATION = NumberedName("step-", ".json", digits=6)
ASIDE = NumberedName("replaced-")
RANK_LOG = NumberedName("rank-", ".log")
LAUNCH_LOG = NumberedName(
    "launch-", ".log"
)  # what a launcher prints that `bico-ds demo` starts, and its ranks

_STATE: dict[str, Callable[[Any], bool]] = {
    "state": lambda value: value in get_args(State),
    "step": lambda value: value is None or (type(value) is int and value >= 0),
    "reason": lambda value: isinstance(value, str),
    "run_id": lambda value: isinstance(value, str),
    "time": is_number,
    "failed_rank": lambda value: value is None or (type(value) is int and value >= 0),
    "failed_host": lambda value: value is None or is_node_name(value),
}


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
        self.lock = RunLock(self.path / "lock.json", is_unclaimed=self._holds_own_state)

    recipe_file = property(lambda self: self.path / "recipe.yaml")
    run_file = property(lambda self: self.path / "run.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    last_checkpoint_file = property(lambda self: self.path / "last_checkpoint.json")
    best_checkpoint_file = property(lambda self: self.path / "best_checkpoint.json")
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
        return self.evaluation / EVALUATION.of(step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after so many steps is kept. What is none, and has its name, goes to a replaced-N/."""
        file = self.evaluation_file(step)
        try:
            read_object(file, strict=False)
        except JsonError as error:
            if os.path.lexists(file):
                aside = self.new_aside() / file.name
                file.rename(aside)
                print(f"{error}; it is kept as {aside}, and the evaluation done again", flush=True)
            return False
        return True

    def evaluations_after(self, step: int) -> list[Path]:
        """The kept evaluations of later steps."""
        return [path for of, path in EVALUATION.in_folder(self.evaluation) if of > step]

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
        self._refuse_no_files(self.state_file, self.run_file)
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
        self._refuse_no_files(
            self.metrics_file, self.recipe_file, self.last_checkpoint_file, self.best_checkpoint_file
        )
        may = os.R_OK | os.W_OK
        if self.metrics_file.is_file() and not os.access(self.metrics_file, may, effective_ids=True):
            raise UserError(
                f"cannot read and write '{self.metrics_file}': {os.strerror(errno.EACCES)}; "
                "put that right, or choose another folder with --output-dir"
            )

    def _refuse_no_files(self, *files: Path) -> None:
        for file in files:
            if os.path.lexists(file) and not file.is_file():
                raise UserError(f"'{file}' is no file; move it away")

    def record(self, recipe: Recipe) -> None:
        """Write the recipe, and this start's provenance, in the place of and after those of earlier ones."""
        write_atomically(self.recipe_file, dump_recipe(recipe))
        start = {"run_id": self.lock.run_id, **provenance()}
        self._write_starts([*self._recorded_starts(), start])

    def add_to_start(self, **facts: Any) -> None:
        """Add facts to this start's part of run.json. Raises OSError."""
        if not self.run_file.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.run_file))
        starts = self._recorded_starts()
        if not starts:  # it was damaged meanwhile
            starts = [{"run_id": self.lock.run_id, **provenance()}]
        if starts[-1].get("run_id") == self.lock.run_id:  # else another start has taken the folder over
            self._write_starts([*starts[:-1], starts[-1] | facts])

    def _recorded_starts(self) -> list[dict[str, Any]]:
        """The starts in run.json. A file that holds no such list is kept in a replaced-N/, and said. Raises OSError."""
        try:
            return read_starts(self.run_file)
        except JsonError as error:
            aside = self.new_aside() / self.run_file.name
            self.run_file.rename(aside)
            print(f"{error}; it is kept as {aside}, and a new one begun", flush=True)
            return []

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        write_atomically(self.run_file, json.dumps(starts, indent=1) + "\n")

    def write_state(self, state: State, *, step: int | None, reason: str = "", **facts: Any) -> None:
        """Write the state file that launchers decide by. Raises `FencedError` as `RunLock.check` does.

        On a disk that is full, this run's last state is overwritten in its place. Raises OSError where neither could be
        done for `_PATIENCE_SECONDS`. `facts`: further ones of a failure (`bico_ds.runtime.nodes.failed_node`).
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self.lock.check()
                write_atomically(self.state_file, self._state(state, step, reason, facts))
                return
            except OSError:
                if self._overwrite_own_state(state, step, reason):
                    return
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PATIENCE_SECONDS / 20)

    def _state(self, state: State, step: int | None, reason: str, facts: dict[str, Any]) -> str:
        content = {
            "state": state,
            "step": step,
            "reason": text_without_secrets(reason),
            "run_id": self.lock.run_id,
            "time": time.time(),
            **facts,
        }
        return json.dumps(content) + "\n"

    def _overwrite_own_state(self, state: State, step: int | None, reason: str) -> bool:
        """Where the state is this run's, wherever the folder is now; returns whether it was done."""
        folder = self.lock.folder()
        if folder is None:
            return False
        content = self._state(state, step, reason[:_OVERWRITTEN_REASON], {})
        try:
            return overwrite(folder / self.state_file.name, content, only_if=self._is_own_state)
        except OSError:
            return False

    def _is_own_state(self, content: bytes) -> bool:
        try:
            return parse_object(content, self.state_file, strict=False).get("run_id") == self.lock.run_id
        except JsonError:
            return False

    def _holds_own_state(self) -> bool:
        try:
            return self._is_own_state(self.state_file.read_bytes())
        except OSError:
            return False

    def fail(self, reason: str, **facts: Any) -> None:
        """Record that the run failed; of a start that did not begin training only where no run was recorded before.

        Raises `FencedError` as `RunLock.check` does. Where no other run has written a state since this run lost the folder,
        and where the folder was renamed, it is recorded all the same: nobody else would say that this run has ended.
        """
        try:
            self.lock.check()
        except (FencedError, OSError):
            self._overwrite_own_state("failed", None, reason)
            raise
        if not self.is_of_earlier_start():
            self.write_state("failed", step=None, reason=reason, **facts)

    def is_of_earlier_start(self) -> bool:
        """Whether an earlier start is recorded here: this one has not begun training, and leaves all as it was."""
        recorded = read_state(self.state_file) or {}
        return recorded.get("run_id") != self.lock.run_id and self.recipe_file.is_file()

    def preempt(self, reason: str) -> None:
        """Record that a start was stopped before it began training, unless the run was finished already.

        Raises `FencedError` as `RunLock.check` does.
        """
        recorded = read_state(self.state_file) or {}
        if recorded.get("state") != "done":
            self.write_state("preempted", step=recorded.get("step"), reason=reason)

    def set_aside(self) -> None:
        """Move what an earlier run left (recipe, checkpoints, metrics …) into replaced-N/: nothing of it is deleted.

        The logs of ranks and launchers stay: like run.json they tell of all starts, and this one writes them already.
        """
        if not self._holds_a_run():
            return
        kept = {self.lock.path.name, self.state_file.name, self.run_file.name, self.logs.name}
        kept |= {"slurm", "stop", "native_ops"}
        old = [
            p for p in self.path.iterdir() if p.name not in kept and not p.name.startswith((".", "replaced-"))
        ]
        aside = self.new_aside()
        for path in old:
            path.rename(aside / path.name)
        if not self.logs.is_symlink():  # else they may be on another disk
            self._move_logs(aside / self.logs.name)

    def _move_logs(self, aside: Path) -> None:
        """All but those that stay, one by one: a rank that writes its log meanwhile finds it where it was."""
        self.logs.mkdir(exist_ok=True)
        staying = {path for name in (RANK_LOG, LAUNCH_LOG) for _, path in name.in_folder(self.logs)}
        logs = [path for path in self.logs.iterdir() if path not in staying]
        if logs:
            aside.mkdir()
        for path in logs:
            path.rename(aside / path.name)

    def _holds_a_run(self) -> bool:
        left = (self.metrics_file.is_file(), self.last_checkpoint_file.is_file())
        return any(left) or bool(STEP.in_folder(self.checkpoints))

    def new_aside(self) -> Path:
        """Make the next replaced-N/."""
        numbers = [number for number, _ in ASIDE.in_folder(self.path)]
        aside = self.path / ASIDE.of(1 + max(numbers, default=0))
        aside.mkdir()
        return aside

    def remove_incomplete(self) -> None:
        """Remove the files that killed starts left half written; only what a start writes is its own to remove."""
        files = (
            self.lock.path,
            self.state_file,
            self.recipe_file,
            self.metrics_file,
            self.last_checkpoint_file,
            self.best_checkpoint_file,
        )
        for file in (*files, self.run_file):
            remove_incomplete(self.path, file.name)
        folders = {
            self.evaluation: "step-*",
            self.logs: "*",
            self.checkpoints: "*",
            self.tensorboard: "events.*",
        }
        for folder, names in folders.items():
            remove_incomplete(folder, names)
        for path in self.path.iterdir():
            if _TEMPORARY_OF_0_1_0.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back."""
        self.lock.release()


def read_state(path: Path) -> dict[str, Any] | None:
    """What `write_state` wrote, as far as it is of its types; None where there is no state file, or it is broken.

    A broken one tells nothing, and the next start writes it anew.
    """
    try:
        return known_state(read_object(path, strict=False))
    except JsonError:
        return None


def known_state(content: dict[str, Any]) -> dict[str, Any]:
    """What of a state file's content is as `write_state` writes it."""
    return {key: content[key] for key, fits in _STATE.items() if key in content and fits(content[key])}


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a run.json, oldest first; none where there is no such file. Raises `JsonError` for anything else."""
    try:
        starts = read_json(path, strict=False)
    except JsonError as error:
        if error.is_missing and not os.path.lexists(path):
            return []
        raise
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise JsonError(path, "no list of starts")
    return starts


def split_metrics(path: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines of a metrics.jsonl up to a step, and those that a run which goes on from there writes again.

    A line that is no JSON (a crash cut it, a disk damaged it) is among the latter.
    """
    kept: list[str] = []
    later: list[str] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            (kept if _is_of_step_until(line, step, path) else later).append(line)
    return kept, later


def _is_of_step_until(line: str, step: int, path: Path) -> bool:
    written = object_in(line, path) if line.endswith("\n") else None
    of: Any = (written or {}).get("step")
    return is_number(of) and of <= step


def obstacle(folder: Path, error: OSError) -> str:
    """Why nothing can be written into a folder."""
    if folder.is_symlink() and not folder.exists():
        return f"it is a link to '{folder.readlink()}', which is not there"
    return "it is no folder" if folder.is_file() else str(error.strerror)
