"""TensorBoard's event file, written record by record. Rank 0 only.

torch's `SummaryWriter` hands records to a thread: the first write that fails ends it with a traceback, every later call
raises that error, and a folder that was removed never comes back.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.common.appended_file import AppendedFile
from bico_ds.common.files import atomic_file
from bico_ds.training.callbacks.tensorboard.checksum import masked_crc32c

_numbers = itertools.count()  # of this process's event files: their names sort as they were begun
# The end of a name that says which tags the file has: those of bico_ds.training.callbacks.tensorboard.tags. Files of runs
# begun before these were so end in a number.
TAGS = ".tags2"


class EventFile:
    """A new event file in `folder`, below `root`, which is there. It hides the events of earlier files from `first_step` on.

    That mark comes first in it, also where the file was removed and is made again.
    """

    def __init__(self, folder: Path, *, root: Path, first_step: int) -> None:
        now = time.time()
        start = Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START))
        head = [version(), start]
        self.file = AppendedFile(folder / _new_name(now), root=root, head=b"".join(map(record, head)))
        self.file.add(b"")  # the head is written before there is a number

    def add(self, summary: Summary, step: int, *, at: float | None = None) -> None:
        """Let the values of a step wait; `file.write_waiting` writes them. `at`: when they were known, if not now."""
        wall_time = time.time() if at is None else at
        self.file.add(record(Event(wall_time=wall_time, step=step, summary=summary)))


def write_events(folder: Path, events: Iterable[Event]) -> None:
    """Write events into a file that is read before all others, and is there as a whole or not at all. Raises OSError."""
    with atomic_file(folder / _new_name(0)) as temporary, temporary.open("wb") as file:
        file.writelines(map(record, itertools.chain([version()], events)))


def has_todays_tags(path: Path) -> bool:
    """Whether an event file was written with today's tags."""
    return path.name.endswith(TAGS)


def version() -> Event:
    """What an event file begins with."""
    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _new_name(now: float) -> str:
    return f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):03d}{TAGS}"


def record(event: Event) -> bytes:
    """An event as the file holds it: with its length and checksums."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(checks) + content + next(checks)
