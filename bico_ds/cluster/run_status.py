"""What run folders show of their runs: state, step, loss, speed. No torch here.

Whatever lies in a folder, its other files still tell what they know, and the other runs are shown.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bico_ds.checkpoint import record
from bico_ds.cluster.attempts import attempts_file, newest_step, read_attempts
from bico_ds.cluster.bad_nodes import excluded_nodes
from bico_ds.common.errors import UserError
from bico_ds.common.json_files import (
    JsonError,
    is_number,
    object_in,
    read_bounded,
    read_object,
    read_object_lines,
)
from bico_ds.common.printable import on_one_line
from bico_ds.runtime.lock import Lock, living_locks, read_lock
from bico_ds.runtime.nodes.failed_node import is_node_name
from bico_ds.runtime.nodes.slow_rank import FACTOR_TAG, RANK_TAG, SLOW
from bico_ds.runtime.run_folder import RunFolder, known_state, read_starts

_TAIL_BYTES = 1 << 16
_RECIPE_BYTES = 1 << 20
_MOST_DEPTH = 50  # of a recipe's YAML: a parser's time grows with the square of it
_MOST_CHARACTERS = 1000  # of a reason
# Ten times as fast, where PyYAML was built with it.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_IN_LIST = object()

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its folder shows it.

    `state` is the state file's, or `starting` where a start holds the folder and does not train yet, `lost` where it should
    be running and no process is alive, `waiting` before any start, `unreadable` where the folder, its state file or its
    recipe is broken; `reason` names what is broken. `loss` and `tokens_per_second` (original tokens) are those of the last
    training line, `checkpoint` is the step of the newest one (0: none). `total_steps` is None where the recipe gives epochs.
    `slow`: in words, the rank that the last line shows to be slow. `excluded`: the nodes that the job leaves out.
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
    slow: str = ""
    excluded: tuple[str, ...] = ()


def find_runs(paths: Iterable[Path]) -> Iterator[Path]:
    """Run folders at or below `paths`, not looking inside of one.

    A folder that cannot be read comes, too: its status says so. What links lead to again is looked into once.
    """
    seen: set[tuple[int, int]] = set()
    waiting = sorted(paths, reverse=True)
    while waiting:
        path = waiting.pop()
        try:
            is_run = any((path / name).is_file() for name in ("state.json", "lock.json", "slurm/recipe.yaml"))
            folder = path.stat()
            if not is_run and (folder.st_dev, folder.st_ino) not in seen:
                seen.add((folder.st_dev, folder.st_ino))
                waiting += sorted((path / name for name in _folders_in(path)), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            is_run = True
        if is_run:
            yield path


def _folders_in(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return [
            entry.name
            for entry in entries
            if (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
        ]


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


class _Reader:
    """Reads the parts of a run: where one is broken, that is noted, and a default stands in its place."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def read(self, what: Path, work: Callable[[Path], Value], default: Value) -> Value:
        try:
            return work(what)
        except JsonError as error:
            if not error.is_missing:
                self.faults.append(f"{what.name}: {error.reason}")
        except OSError as error:
            self.faults.append(f"{what.name}: {error.strerror}")
        except (UserError, ValueError, yaml.YAMLError) as error:
            self.faults.append(f"{what.name}: {str(error).removeprefix(f'{what}: ')}")
        return default


def _read_status(run: Path, living: dict[Path, Lock]) -> RunStatus:
    folder, reader = RunFolder(run), _Reader()
    if not reader.read(run, _is_open, False):
        return _closed(run, reader.faults)
    state: dict[str, Any] = reader.read(folder.state_file, _recorded_state, {})
    recipes = [path for path in (folder.recipe_file, run / "slurm" / "recipe.yaml") if os.path.lexists(path)]
    total_steps = reader.read(recipes[0], _total_steps, None) if recipes else None
    is_broken = bool(reader.faults)
    lock = reader.read(folder.lock.path, read_lock, None)
    numbers: dict[str, Any] = reader.read(folder.metrics_file, last_numbers, {})
    checkpoint = newest_step(run)
    now = _state(state, living.get(folder.lock.path), was_held=lock is not None)
    last = reader.read(folder.last_checkpoint_file, lambda path: _missing(folder, checkpoint), "")
    begun: list[dict[str, Any]] = reader.read(folder.run_file, read_starts, [])
    # One that died in its pre-flight is known to the batch script only.
    tried: list[dict[str, Any]] = reader.read(attempts_file(run), lambda path: read_attempts(run), [])
    job = lock.job if lock is not None else ""
    job = job or reader.read(run / "slurm" / "jobs.jsonl", _last_job, "")
    why = [] if now == "starting" else [last or state.get("reason", "")]
    return RunStatus(
        run=str(run),
        state="unreadable" if is_broken else now,
        reason=on_one_line("; ".join(filter(None, [*reader.faults, *why])), most=_MOST_CHARACTERS),
        step=numbers.get("step", state.get("step")),
        total_steps=total_steps,
        loss=numbers.get("loss/all"),
        tokens_per_second=numbers.get("speed/represented_tokens_per_second"),
        checkpoint=checkpoint,
        starts=max(len(begun), len(tried)),
        job=on_one_line(job, most=_MOST_CHARACTERS),
        changed=_changed(folder, state),
        slow=_slow_rank(numbers, begun) if now == "running" else "",
        excluded=tuple(excluded_nodes(run, tried[-1]["job"] if tried else job)),
    )


def _slow_rank(numbers: dict[str, Any], starts: list[dict[str, Any]]) -> str:
    """By the last training line, with the node that run.json has of the rank; empty where none is slow."""
    rank, factor = numbers.get(RANK_TAG), numbers.get(FACTOR_TAG, 0.0)
    if type(rank) is not int or factor < SLOW:
        return ""
    hosts = starts[-1].get("hosts") if starts else None
    on = (
        f" on {hosts[rank]}"
        if isinstance(hosts, list) and 0 <= rank < len(hosts) and is_node_name(hosts[rank])
        else ""
    )
    return f"rank {rank}{on} works {factor:.1f} times as long as the others"


def _is_open(run: Path) -> bool:
    """True, where what is in the folder can be looked at. Raises OSError."""
    os.scandir(run).close()
    with contextlib.suppress(FileNotFoundError):
        os.lstat(run / "state.json")
    return True


def _closed(run: Path, faults: list[str]) -> RunStatus:
    return RunStatus(
        run=str(run),
        state="unreadable",
        reason=on_one_line("; ".join(faults), most=_MOST_CHARACTERS),
        step=None,
        total_steps=None,
        loss=None,
        tokens_per_second=None,
        checkpoint=0,
        starts=0,
        job="",
        changed=None,
    )


def _recorded_state(path: Path) -> dict[str, Any]:
    state = known_state(read_object(path, strict=False))
    if "state" not in state:
        raise ValueError("names no state")
    return state


def _missing(folder: RunFolder, newest: int) -> str:
    """What became of the newest checkpoint, where it is not there any more."""
    last = record.read(folder)
    if last is None or newest >= last.step or not last.is_own:
        return ""
    return f"checkpoint of step {last.step} is gone"


def last_numbers(path: Path) -> dict[str, Any]:
    """The numbers of the last training line of metrics.jsonl, empty without one.

    Read from the end, for the file may be long. Raises OSError.
    """
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read(2 * _TAIL_BYTES).split(b"\n")
    for line in reversed(lines):
        numbers = (object_in(line, path) or {}) if b'"kind": "train"' in line else {}
        if type(numbers.get("step")) is int:
            return {key: value for key, value in numbers.items() if is_number(value)}
    return {}


def _state(state: dict[str, Any], living: Lock | None, *, was_held: bool) -> str:
    """`living`: the lock of a holder that is alive; `was_held`: there is a lock, its holder alive or dead."""
    recorded = str(state.get("state", "starting" if was_held else "waiting"))
    if living is not None:
        return recorded if living.run_id == state.get("run_id") else "starting"
    return "lost" if recorded in ("starting", "running") else recorded


def _total_steps(recipe: Path) -> int | None:
    return _steps_in(read_bounded(recipe, most_bytes=_RECIPE_BYTES))


def _steps_in(recipe: bytes) -> int | None:
    """`training.steps` of a resolved recipe; None where it is null. Raises ValueError, `yaml.YAMLError`.

    Nothing is constructed: the recipe of a stranger may hold whatever YAML can, and thousands of runs may be looked at.
    """
    # Of each mapping that is open the key whose value comes, None where a key comes.
    keys: list[Any] = []
    found = None
    for event in yaml.parse(recipe, Loader=_YAML):
        if isinstance(event, yaml.CollectionStartEvent):
            if len(keys) == _MOST_DEPTH or (keys and keys[-1] is None):
                raise ValueError("nested too deep, or with a key that is no text")
            keys.append(None if isinstance(event, yaml.MappingStartEvent) else _IN_LIST)
            continue
        text = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
        elif isinstance(event, yaml.NodeEvent) and keys and keys[-1] is None:
            keys[-1] = text
            continue
        elif keys == ["training", "steps"]:
            found = text
        if keys and keys[-1] is not _IN_LIST:
            keys[-1] = None
    if found in ("null", "~"):
        return None
    if found is None or not (found.isascii() and found.isdecimal() and len(found) < 19):
        raise ValueError("names no training.steps")
    return int(found)


def _last_job(path: Path) -> str:
    jobs = [line["job"] for line in read_object_lines(path) if isinstance(line.get("job"), str)]
    return jobs[-1] if jobs else ""


def _changed(folder: RunFolder, state: dict[str, Any]) -> float | None:
    recorded = state.get("time")
    try:
        return max(folder.metrics_file.stat().st_mtime, recorded or 0.0)
    except OSError:
        return recorded
