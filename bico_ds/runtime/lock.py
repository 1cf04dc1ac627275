"""The lock of a run folder: who may write there, kept alive by a heartbeat. No torch here.

The clocks of two machines differ, so no time that another machine has written is compared with ours. A heartbeat is a new
content of the lock file. Whether a holder is alive is known by waiting for the next one, and, faster, by the file system's
clock: the age of the lock file compared with a file that is made beside it now.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
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
from bico_ds.common.files import overwrite, write_atomically
from bico_ds.common.json_files import JsonError, is_number, parse_object
from bico_ds.runtime.launch_environment import slurm_job

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 6 * HEARTBEAT_SECONDS  # a holder without a heartbeat for so long is dead
SETTLE_SECONDS = 0.5  # two that start at the same moment: the later one has written by then
# Some file systems (Lustre) take the time of a file from the machine that writes it, and clocks differ by less than this.
SKEW_SECONDS = 600.0
_PIDS = 1 << 31  # a process's number is below

_logger = logging.getLogger(__name__)


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

    `on_lost` is called, from a thread, when this run has lost the folder (`loss`). A lock file that somebody removed is
    written again where `is_unclaimed` says that no other run has been in the folder since.
    """

    def __init__(self, path: Path, *, is_unclaimed: Callable[[], bool] = lambda: False) -> None:
        self.path = path
        self.run_id = uuid.uuid4().hex[:12]
        self._is_unclaimed = is_unclaimed
        self._folder: int | None = None  # a descriptor, which stays with a folder that is renamed
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
        with contextlib.suppress(OSError):  # a folder that may be written and not listed
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._heart = threading.Thread(target=self._send_heartbeats, name="run-folder-lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise `FencedError` unless this run still holds the lock: before every checkpoint and every state."""
        if not self._is_held():
            raise FencedError(self.loss())

    def loss(self) -> str:
        """Why this run does not hold the lock any more, and whose the folder is now."""
        here, now, lock = self.path.parent, self.folder(), read_lock(self.path)
        if now is None:
            return f"'{here}' was removed while this run ({self.run_id}) wrote there; it stops"
        if now != here:
            return (
                f"'{here}' was renamed to '{now}' while this run ({self.run_id}) wrote there; it stops. The same command "
                f"with --output-dir {shlex.quote(str(now))} goes on from its last checkpoint"
            )
        if lock is None:
            return (
                f"{here}: this run ({self.run_id}) lost the folder: '{self.path.name}' was removed, and the state there is "
                "not this run's; it stops writing"
            )
        job = f", job {lock.job}" if lock.job else ""
        holder = f"run {lock.run_id} (process {lock.pid} on {lock.host}{job})"
        return f"{here}: this run ({self.run_id}) lost the folder to {holder}; it stops writing"

    def folder(self) -> Path | None:
        """The folder of the lock as it is named now, if it was renamed since `take`; None where it was removed."""
        here = self.path.parent
        if self._folder is None or _is_same(here, self._folder):
            return here
        with contextlib.suppress(OSError):
            now = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            return now if _is_same(now, self._folder) else None
        return None

    def _is_held(self) -> bool:
        """Whether the lock is this run's; it is written again where somebody removed it. Raises OSError."""
        lock = read_lock(self.path)
        if lock is not None:
            return lock.run_id == self.run_id
        if self._folder is None or not _is_same(self.path.parent, self._folder) or not self._is_unclaimed():
            return False
        self.write_heartbeat()
        _logger.warning("WARNING: '%s' was removed or damaged; this run has written it again", self.path)
        return True

    def write_heartbeat(self) -> None:
        """Write the lock anew; on a full disk, which has no room for a new file, in its old place. Raises OSError."""
        lock = Lock(
            run_id=self.run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=slurm_job(),
            heartbeat=time.time(),
        )
        content = json.dumps(asdict(lock)) + "\n"
        try:
            write_atomically(self.path, content)
        except OSError:
            if not self.path.is_file() or not overwrite(self.path, content, only_if=self._is_mine):
                raise

    def release(self) -> None:
        """Stop the heartbeat, and remove the lock if it is still ours, also in a folder that was renamed."""
        self._released.set()
        if self._heart is not None:
            self._heart.join()
        if (folder := self.folder()) is not None:
            path = folder / self.path.name
            lock = read_lock(path)
            if lock is not None and lock.run_id == self.run_id:
                path.unlink(missing_ok=True)
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _is_mine(self, content: bytes) -> bool:
        """Whether this run wrote the content of a lock file."""
        try:
            return parse_object(content, self.path).get("run_id") == self.run_id
        except JsonError:
            return False

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_held():
                    self.write_heartbeat()
                else:
                    self.on_lost()


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except OSError:
        return False


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
