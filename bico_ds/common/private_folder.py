"""Folders and files that nobody else can have written: from those alone compiled code is loaded. No torch here.

A name protects nothing: whoever can write into a folder can put there, under a name that he can compute, what the next
process loads. Root is trusted, as by every program.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_MODE = 0o700


class NotPrivateError(OSError):
    """A folder that belongs to somebody else, or is none: nothing in it is read."""


def open_private_folder(folder: Path) -> bool:
    """Make `folder` for this user alone (mode 0700), with what is above it; tighten one of ours that others could enter.

    Returns whether what it holds can be trusted: not where others could have written or replaced it before. Raises
    `NotPrivateError` for a symbolic link and for a folder of another user, OSError where none can be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=_MODE)
    if folder.is_symlink():
        raise NotPrivateError(f"'{folder}' is a symbolic link")
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            raise NotPrivateError(f"'{folder}' is no folder")
        if status.st_uid != os.geteuid():
            raise NotPrivateError(f"'{folder}' belongs to another user (id {status.st_uid})")
        if stat.S_IMODE(status.st_mode) == _MODE:
            return True
        os.fchmod(descriptor, _MODE)
        return False
    finally:
        os.close(descriptor)


def open_private_file(file: Path) -> int | None:
    """A descriptor, to be closed, of a regular file of this user that nobody else can write to; None for any other file.

    The caller uses what the descriptor names, which cannot be exchanged any more. Raises OSError where there is no file.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError:  # a symbolic link, or of another user
        return None
    status = os.fstat(descriptor)
    is_private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_private and stat.S_ISREG(status.st_mode):
        return descriptor
    os.close(descriptor)
    return None
