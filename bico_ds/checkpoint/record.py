"""Which checkpoint a run has to go on from, recorded outside of `checkpoints/`. No torch here.

A folder of checkpoints that was deleted, moved, or lies on a disk that is not mounted looks like that of a run which never
had one. The record tells the two apart: a run whose checkpoints are gone is not begun anew without a word.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bico_ds.checkpoint import manifest
from bico_ds.checkpoint.manifest import FoundCheckpoint
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.runtime.run_folder import RunFolder, read_state

_SAVE = re.compile(r'\{"step": ([0-9]{1,18}), "kind": "checkpoint"')


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """The newest checkpoint of a run, or the other run's that it was resumed from, whether it is still there or not.

    `path` is relative to the run folder where it lies below that, else absolute. `time` is in seconds since the epoch, None
    where it is not known.
    """

    step: int
    path: str
    time: float | None

    is_own = property(lambda self: not Path(self.path).is_absolute())


def write(folder: RunFolder, checkpoint: Path, step: int) -> None:
    """Record a complete checkpoint as the newest one. Raises OSError, and `FencedError` as `RunLock.check` does."""
    folder.lock.check()
    committed = CommittedCheckpoint(
        step=step,
        path=_path_in_record(checkpoint, folder),
        time=(checkpoint / manifest.MANIFEST).stat().st_mtime,
    )
    write_atomically(folder.last_checkpoint_file, json.dumps(asdict(committed)) + "\n")


def is_own(checkpoint: Path, folder: RunFolder) -> bool:
    """Whether a checkpoint lies in this run's folder of checkpoints."""
    return checkpoint.resolve().parent == folder.checkpoints.resolve()


def read(folder: RunFolder) -> CommittedCheckpoint | None:
    """What `write` recorded last; of runs of earlier versions, what their metrics and state show. None: there was none.

    Raises `UserError` where the record is damaged.
    """
    path = folder.last_checkpoint_file
    try:
        return _committed(CommittedCheckpoint(**read_object(path)))
    except JsonError as error:
        if error.is_missing:
            return _of_an_earlier_version(folder)
        why = f" ({error.reason})"
    except (OSError, OverflowError, ValueError, TypeError):
        why = " (no record as a run writes it)"
    raise UserError(f"{path}: damaged; remove it to go on by what is in '{folder.checkpoints}'{why}")


def newest_complete(
    folder: RunFolder, report: Callable[[str], None], *, starts: bool = True
) -> FoundCheckpoint | None:
    """The newest complete checkpoint of a run; None where it never had one.

    `report` gets a line for each damaged one that is passed over, and where the newest one recorded is not there. Raises
    `UserError` where there are checkpoints and none is complete, and as `refuse_lost` does.
    """
    refuse_lost(folder, starts=starts)
    found = manifest.find(folder.checkpoints, report)
    last = read(folder)
    if found is not None and last is not None and found.step < last.step:
        newest = folder.path / last.path
        if not os.path.isdir(newest):  # a damaged one was reported by `find`
            report(
                f"WARNING: '{newest}', written{_when(last)}, is not there any more: "
                f"the steps after {found.step} are lost"
            )
    return found


def refuse_lost(folder: RunFolder, *, starts: bool = True) -> None:
    """Raise `UserError` where a run had a checkpoint and now has none. Looks at names only.

    `starts`: whether this is a start of that run, whose ways on the message names.
    """
    last = read(folder)
    if last is None or manifest.checkpoints_in(folder.checkpoints):
        return
    anew = ", or begin anew with --resume none"
    if not last.is_own:
        raise UserError(
            f"'{folder.path}' went on from '{last.path}', step {last.step}, and has no checkpoint of its own"
            + (f": go on from there with --resume {last.path}{anew}" if starts else f": name '{last.path}'")
        )
    raise UserError(
        f"'{folder.checkpoints}' {_emptiness(folder.checkpoints)}, but the checkpoint of step {last.step} was "
        f"written there{_when(last)}{_finished(folder)}: restore or mount it"
        + (f", name another with --resume PATH{anew}" if starts else "")
    )


def at(path: Path, report: Callable[[str], None]) -> FoundCheckpoint | None:
    """The checkpoint in a folder, or the newest complete one of a run folder.

    Raises `UserError` as `manifest.verify` and `newest_complete` do.
    """
    folder = RunFolder(path)
    is_run = folder.checkpoints.is_dir() or read(folder) is not None
    return newest_complete(folder, report, starts=False) if is_run else manifest.verify(path)


def _committed(read: CommittedCheckpoint) -> CommittedCheckpoint:
    """What was read, with its values of the types that they have. Raises ValueError, TypeError, OSError, OverflowError."""
    time.localtime(read.time)  # as messages show it
    if type(read.step) is not int or not isinstance(read.path, str) or not read.path.isprintable():
        raise TypeError
    return read


def _path_in_record(checkpoint: Path, folder: RunFolder) -> str:
    own = Path(folder.checkpoints.name, checkpoint.name)
    return str(own if is_own(checkpoint, folder) else checkpoint.resolve())


def _of_an_earlier_version(folder: RunFolder) -> CommittedCheckpoint | None:
    """Every save wrote a line into metrics.jsonl, and a state names the step of a checkpoint, or 0."""
    steps = [(read_state(folder.state_file) or {}).get("step") or 0]
    try:
        if folder.metrics_file.is_file():
            with open(folder.metrics_file, encoding="utf-8", errors="replace") as lines:
                steps += [int(save[1]) for save in map(_SAVE.match, lines) if save]
    except OSError as error:  # else a run that had checkpoints could begin anew without a word
        raise UserError(f"cannot read '{folder.metrics_file}': {error.strerror}; make it readable") from None
    step = max(steps)
    path = str(Path(folder.checkpoints.name, manifest.name_of(step)))
    return CommittedCheckpoint(step=step, path=path, time=None) if step else None


def _emptiness(root: Path) -> str:
    if root.is_symlink() and not root.exists():
        return f"is a link to '{root.readlink()}', which is not there"
    return "holds no checkpoint" if root.exists() else "is not there"


def _when(last: CommittedCheckpoint) -> str:
    return f" on {time.strftime('%Y-%m-%d at %H:%M:%S', time.localtime(last.time))}" if last.time else ""


def _finished(folder: RunFolder) -> str:
    is_done = (read_state(folder.state_file) or {}).get("state") == "done"
    return (
        f" (the run is done, and its model is in '{folder.export}')"
        if is_done and folder.export.is_dir()
        else ""
    )
