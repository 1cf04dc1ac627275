"""Disks that take no more, without one being filled."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Any write beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def room_for_no_new_file(folder: Path) -> Iterator[None]:
    """No file can be made in `folder`, and those that are there can be overwritten: as on a full disk.

    Root may make files in any folder, and is another user meanwhile; so nobody but it may be kept out of what is above.
    """
    files = [folder, *folder.iterdir()]
    if os.geteuid() == 0:
        for path in files:
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    os.chmod(folder, 0o555)
    try:
        yield
    finally:
        os.chmod(folder, 0o755)
        if os.getuid() == 0:
            os.seteuid(0)
