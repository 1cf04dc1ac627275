"""What run folders show of their runs: state, step, loss, speed. No torch here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bico_ds.checkpoint import record
from bico_ds.cluster.attempts import newest_step, read_attempts
from bico_ds.runtime.lock import Lock, living_locks, read_lock
from bico_ds.runtime.run_folder import RunFolder, read_state

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its folder shows it.

    `state` is the state file's, or `starting` where a start holds the folder and does not train yet, `lost` where it should
    be running and no process is alive, `waiting` before any start, `unreadable` where a file is broken. `loss` and
    `tokens_per_second` (original tokens) are those of the last training line, `checkpoint` is the step of the newest one (0:
    none). `total_steps` is None where the recipe gives epochs.
    """

    run: str
    state: str
    reason: str
    step: int | None
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    checkpoint: int
    starts: int
    job: str
    changed: float | None  # seconds since the epoch


def find_runs(paths: Iterable[Path]) -> Iterator[Path]:
    """Run folders at or below `paths`, not looking inside of one."""
    for path in sorted(paths):
        if any((path / name).is_file() for name in ("state.json", "lock.json", "slurm/recipe.yaml")):
            yield path
        elif path.is_dir():
            yield from find_runs(child for child in path.iterdir() if child.is_dir())


def print_watch(count: int, seconds: float) -> None:
    """The user's reason for a delay, on stderr."""
    locks = "1 lock" if count == 1 else f"{count} locks"
    print(f"watching {locks} for up to {math.ceil(seconds)} seconds …", file=sys.stderr, flush=True)


def read_statuses(
    runs: Iterable[Path], *, on_watch: Callable[[int, float], None] = print_watch
) -> list[RunStatus]:
    """Read run folders.

    Takes some seconds where a lock does not show at once whether its holder is alive; `on_watch` is that of `living_locks`.
    """
    runs = list(runs)
    locks = [RunFolder(run).lock.path for run in runs]
    living = living_locks(filter(_is_readable, locks), on_watch=on_watch)
    return [_read_status(run, living) for run in runs]


def _is_readable(lock: Path) -> bool:
    try:
        read_lock(lock)
    except OSError:
        return False
    return True


def _read_status(run: Path, living: dict[Path, Lock]) -> RunStatus:
    try:
        return _status(run, living)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        return _unreadable(run, error)


def _unreadable(run: Path, error: Exception) -> RunStatus:
    """A file that is half written, or not ours to read, must not hide the other runs."""
    return RunStatus(
        run=str(run),
        state="unreadable",
        reason=f"{type(error).__name__}: {error}",
        step=None,
        total_steps=None,
        loss=None,
        tokens_per_second=None,
        checkpoint=0,
        starts=0,
        job="",
        changed=None,
    )


def _status(run: Path, living: dict[Path, Lock]) -> RunStatus:
    folder = RunFolder(run)
    lock = read_lock(folder.lock.path)
    state = read_state(folder.state_file) or {}
    now = _state(state, living.get(folder.lock.path), was_held=lock is not None)
    numbers = last_numbers(folder.metrics_file)
    step = numbers.get("step", state.get("step"))
    checkpoint = newest_step(run)
    return RunStatus(
        run=str(run),
        state=now,
        reason="" if now == "starting" else _missing(folder, checkpoint) or state.get("reason", ""),
        step=step,
        total_steps=_total_steps(folder),
        loss=numbers.get("loss/all"),
        tokens_per_second=numbers.get("speed/represented_tokens_per_second"),
        checkpoint=checkpoint,
        starts=_starts(run),
        job=_job(run, lock),
        changed=_changed(folder, state),
    )


def _missing(folder: RunFolder, newest: int) -> str:
    """What became of the newest checkpoint, where it is not there any more."""
    last = record.read(folder)
    if last is None or newest >= last.step or not last.is_own:
        return ""
    return f"checkpoint of step {last.step} is gone"


def last_numbers(path: Path) -> dict[str, Any]:
    """The last training line of metrics.jsonl, empty without one; read from the end, for the file may be long."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if '"kind": "train"' in line and line.startswith("{") and line.endswith("}"):
            return json.loads(line)
    return {}


def _state(state: dict[str, Any], living: Lock | None, *, was_held: bool) -> str:
    """`living`: the lock of a holder that is alive; `was_held`: there is a lock, its holder alive or dead."""
    recorded = str(state.get("state", "starting" if was_held else "waiting"))
    if living is not None:
        return recorded if living.run_id == state.get("run_id") else "starting"
    return "lost" if recorded in ("starting", "running") else recorded


def _total_steps(folder: RunFolder) -> int | None:
    for path in (folder.recipe_file, folder.path / "slurm" / "recipe.yaml"):
        if path.is_file():
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            return recipe["training"]["steps"]
    return None


def _starts(run: Path) -> int:
    """Starts by any launcher; one that died in its pre-flight is known to the batch script only."""
    path = run / "run.json"
    begun = len(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0
    return max(begun, len(read_attempts(run)))


def _job(run: Path, lock: Lock | None) -> str:
    if lock is not None and lock.job:
        return lock.job
    path = run / "slurm" / "jobs.jsonl"
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["job"] if path.is_file() else ""


def _changed(folder: RunFolder, state: dict[str, Any]) -> float | None:
    if folder.metrics_file.is_file():
        return max(folder.metrics_file.stat().st_mtime, state.get("time", 0.0))
    return state.get("time")
