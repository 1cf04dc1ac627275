"""The lock of a run folder: who may write there, kept alive by a heartbeat. No torch here.

The clocks of two machines differ, so no time that another machine has written is compared with ours. A heartbeat is a new
content of the lock file. Whether a holder is alive is known by waiting for the next one, and, faster, by the file system's
clock: the age of the lock file compared with a file that is made beside it now.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from bico_ds.common.errors import RunError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, is_number, parse_object
from bico_ds.runtime.launch_environment import slurm_job

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 6 * HEARTBEAT_SECONDS  # a holder without a heartbeat for so long is dead
SETTLE_SECONDS = 0.5  # two that start at the same moment: the later one has written by then
# Some file systems (Lustre) take the time of a file from the machine that writes it, and clocks differ by less than this.
SKEW_SECONDS = 600.0
_PIDS = 1 << 31  # a process's number is below


class FencedError(RunError):
    """Another run has taken this run folder over: nothing more may be written into it."""


class InUseError(Exception):
    """Another run holds the lock; `holder` is None where its lock cannot be read."""

    def __init__(self, holder: Lock | None) -> None:
        super().__init__(holder)
        self.holder = holder


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The content of a lock file. `heartbeat` is the time of the holder's own clock, which only has to be new each time."""

    run_id: str
    host: str
    pid: int
    job: str
    heartbeat: float


def read_lock(path: Path) -> Lock | None:
    """The content of a lock file; None where there is none, or it is no lock. Raises OSError where it cannot be read."""
    try:
        content = parse_object(path.read_bytes(), path)
    except (FileNotFoundError, JsonError):
        return None
    is_lock = (
        all(isinstance(content.get(key), str) for key in ("run_id", "host", "job"))
        and type(content.get("pid")) is int
        and 0 < content["pid"] < _PIDS
        and is_number(content.get("heartbeat"))
    )
    return Lock(**{field.name: content[field.name] for field in fields(Lock)}) if is_lock else None


def living_locks(
    paths: Iterable[Path], *, on_watch: Callable[[int, float], None] = lambda count, seconds: None
) -> dict[Path, Lock]:
    """The locks among these whose holders are alive, as far as can be known at once.

    By the file system's clock, the holder of a lock younger than `SILENT_SECONDS` counts as alive, that of one older than
    `SKEW_SECONDS` as dead. Those in between are watched, all together, for at most one and a half heartbeats; before that,
    `on_watch` gets their number and these seconds. Raises OSError as `read_lock` does.
    """
    found = {path: lock for path in paths if (lock := read_lock(path)) and not _is_dead_here(lock)}
    ages = {path: _age(path) for path in found}
    living = {path for path, age in ages.items() if age is not None and abs(age) <= SILENT_SECONDS}
    doubtful = {path for path, age in ages.items() if age is None or age <= SKEW_SECONDS} - living
    if doubtful:
        seconds = 1.5 * HEARTBEAT_SECONDS
        on_watch(len(doubtful), seconds)
        living |= _with_heartbeat({path: found[path] for path in doubtful}, seconds=seconds)
    return {path: lock for path, lock in found.items() if path in living}


class RunLock:
    """The right of one run to write into a folder; rank 0 takes it, all ranks know its `run_id`.

    `on_lost` is called, from a thread, when another run has taken the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = uuid.uuid4().hex[:12]
        self.on_lost: Callable[[], None] = lambda: None
        self._heart: threading.Thread | None = None
        self._released = threading.Event()

    def take(self) -> None:
        """Write the lock, and keep it alive until `release`. Raises `InUseError` where its holder is alive, OSError.

        To find out takes `SILENT_SECONDS` at the most, where the holder was on another machine and is gone.
        """
        holder = read_lock(self.path)
        if holder is not None and _is_alive(holder, self.path):
            raise InUseError(holder)
        self.write_heartbeat()
        time.sleep(SETTLE_SECONDS)
        holder = read_lock(self.path)
        if holder is None or holder.run_id != self.run_id:
            raise InUseError(holder)
        self._heart = threading.Thread(target=self._send_heartbeats, name="run-folder-lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise `FencedError` unless this run still holds the lock: before every checkpoint and every state."""
        lock = read_lock(self.path)
        if lock is None or lock.run_id != self.run_id:
            holder = f"run {lock.run_id} on {lock.host}" if lock else "nobody"
            raise FencedError(
                f"{self.path.parent}: this run ({self.run_id}) lost the folder to {holder}; it stops writing"
            )

    def write_heartbeat(self) -> None:
        """Write the lock anew."""
        lock = Lock(
            run_id=self.run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=slurm_job(),
            heartbeat=time.time(),
        )
        write_atomically(self.path, json.dumps(asdict(lock)) + "\n")

    def release(self) -> None:
        """Stop the heartbeat, and remove the lock if it is still ours."""
        self._released.set()
        if self._heart is not None:
            self._heart.join()
        lock = read_lock(self.path)
        if lock is not None and lock.run_id == self.run_id:
            self.path.unlink(missing_ok=True)

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                lock = read_lock(self.path)
                if lock is not None and lock.run_id == self.run_id:
                    self.write_heartbeat()
                else:
                    self.on_lost()


def _is_alive(holder: Lock, path: Path) -> bool:
    """What a run must know before it takes the lock: by waiting for a heartbeat, however young the lock file is."""
    if holder.job and holder.job == slurm_job():  # an earlier start of this SLURM job, which has ended
        return False
    return not _is_dead_here(holder) and bool(_with_heartbeat({path: holder}, seconds=SILENT_SECONDS))


def _is_dead_here(lock: Lock) -> bool:
    """Whether the holder was a process of this machine, and has ended."""
    if lock.host != socket.gethostname():
        return False
    try:
        return psutil.Process(lock.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _age(path: Path) -> float | None:
    """Seconds since a lock was written, by the clock of its file system; None where no file can be made beside it."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime
    except OSError:
        return None


def _with_heartbeat(locks: dict[Path, Lock], *, seconds: float) -> set[Path]:
    """Those whose holder writes a heartbeat within so many seconds; returns as soon as all are known."""
    alive: set[Path] = set()
    waiting = dict(locks)
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 8)
        for path, before in list(waiting.items()):
            try:
                now = read_lock(path)
            except OSError:  # a network file system may fail once: it is read again
                continue
            if now != before:
                del waiting[path]
                if now is not None:
                    alive.add(path)
    return alive
