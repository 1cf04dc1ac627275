"""A file that grows by whole records, and that neither a full disk nor its removal ends. No torch here."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from pathlib import Path

MOST_KEPT = 10_000  # records that wait for room; beyond them the oldest are dropped
_FLAGS, _MODE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
_BLOCK = 1 << 20  # bytes written at once: where there is room for a part of what waits, that part is written


class AppendedFile:
    """Appends records to a file; those that cannot be written wait, and come before the next ones that can.

    The file is opened anew each time: where it, or a folder between it and `root`, was removed meanwhile, it is made again,
    and begins with `head`. `root` itself is not made: a run folder that was renamed must not come back.
    """

    def __init__(self, path: Path, *, root: Path, head: bytes = b"") -> None:
        self.path = path
        self._name, self._root, self._head = str(path), root, head
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        # Device, inode, and end of the last whole record of a file in which a failed write may have left a part of one.
        self._torn: tuple[int, int, int] | None = None

    @property
    def missing(self) -> int:
        """The number of records that are not in the file: those that wait, and those that were dropped."""
        return len(self._waiting) + self._dropped

    def add(self, record: bytes) -> None:
        """Let a record wait; `write_waiting` writes it."""
        if len(self._waiting) == MOST_KEPT:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(record)

    def write_waiting(self) -> None:
        """Write the records that wait, in order. Raises OSError; those that are not in the file go on waiting."""
        while self._waiting:
            count, size = 0, 0
            for record in self._waiting:
                if count and size + len(record) > _BLOCK:
                    break
                count, size = count + 1, size + len(record)
            self._write(b"".join(self._waiting[number] for number in range(count)))
            for _ in range(count):
                self._waiting.popleft()

    def _write(self, block: bytes) -> None:
        """The whole block, or nothing of it."""
        descriptor = self._open()
        try:
            end = self._cut_torn(descriptor)
            try:
                _write_all(descriptor, block if end else self._head + block)
            except OSError:
                with contextlib.suppress(OSError):  # else before the next block
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)  # a file system over the network may say only here that its disk is full
        self._torn = None

    def _open(self) -> int:
        """The file's descriptor. A run with a file for each number has no time to look for folders that are there."""
        try:
            return os.open(self._name, _FLAGS, _MODE)
        except FileNotFoundError:
            if not self._root.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root)) from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._name, _FLAGS, _MODE)

    def _cut_torn(self, descriptor: int) -> int:
        """Cut what a failed write left at the end; returns the size of the file, where the next one may leave a part."""
        status = os.fstat(descriptor)
        identity, size = (status.st_dev, status.st_ino), status.st_size
        if self._torn is not None and self._torn[:2] == identity and size > self._torn[2]:
            size = self._torn[2]
            os.ftruncate(descriptor, size)
        self._torn = (*identity, size)
        return size


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
