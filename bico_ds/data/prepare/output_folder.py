"""Where output is prepared: what may be replaced, and the locked folder of unfinished work."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.data.store import is_store


def refuse_output(path: Path, *, force: bool, is_ours: Callable[[Path], bool] = is_store) -> None:
    """Raise `UserError` for an output that exists; with `force` only where it is neither empty nor `is_ours`.

    Raises `UserError`, too, for a name that cannot be one.
    """
    try:
        if not path.exists():
            return
    except OSError as error:
        raise UserError(
            f"cannot write to '{path!s:.200}': {error.strerror}; choose another folder"
        ) from error
    if not force:
        raise UserError(f"'{path}' exists: choose another folder, or give --force to replace it")
    if not is_ours(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"'{path}' was not written by this command, and --force replaces nothing else: choose another "
            "folder, or remove it yourself"
        )


@contextmanager
def work_folder(output: Path, *, on_wait: Callable[[], None], parts: str = "part-*") -> Iterator[Path]:
    """Give the folder of unfinished work beside `output`, locked: one process at a time prepares an output.

    `on_wait` is called where another process holds the lock. At the end, a folder without finished `parts`, a pattern of
    names, is removed. Raises `UserError` where it cannot be written.
    """
    work = work_of(output)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{output.parent}': {error.strerror}") from error
    lock = _lock(work, on_wait)
    try:
        yield work
    finally:
        if work.exists() and not any(work.glob(parts)):
            shutil.rmtree(work)
        os.close(lock)


def work_of(output: Path) -> Path:
    """The name of the folder of unfinished work beside `output`."""
    return output.with_name(f".{output.name}.preparing")


def _lock(work: Path, on_wait: Callable[[], None]) -> int:
    """Wait for the lock; a folder that its last owner removed in the meantime is made again."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(work / "lock")):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
