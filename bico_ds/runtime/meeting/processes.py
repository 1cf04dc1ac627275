"""The processes of the ranks: which of those on this machine are gone, and which ranks anywhere do not answer.

Every rank leaves in the store which process it is. Whether a process has ended only its own machine can tell. For ranks of
other machines there is the roll call: who lives, answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from torch.distributed import Store

from bico_ds.common.json_files import JsonError, parse_object
from bico_ds.runtime import launch_environment
from bico_ds.runtime.host_memory import machine
from bico_ds.runtime.nodes.failed_node import is_node_name, node_name

_PROCESS, _ANSWER = "bico_ds/process/{}", "bico_ds/here/{}"
_CLOCK_SECONDS = 1.0  # psutil's times of a process's start, of two readers
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ProcessIdentity:
    """A process: where its number means anything, its number, and when it began, since numbers are used again; its node."""

    space: str
    pid: int
    began: float
    node: str

    @classmethod
    def own(cls) -> ProcessIdentity:
        return cls(_space(), os.getpid(), psutil.Process().create_time(), node_name())

    @classmethod
    def from_store(cls, content: bytes) -> ProcessIdentity | None:
        """What a rank has left, or None: anybody who reaches the store may have written there."""
        try:
            found = parse_object(content[:1000], Path("process of a rank"))
        except JsonError:
            return None
        space, pid, began, node = (found.get(name) for name in ("space", "pid", "began", "node"))
        if not isinstance(space, str) or not isinstance(pid, int) or not isinstance(began, float):
            return None
        return cls(space, pid, began, node) if 0 < pid < 1 << 31 and is_node_name(node) else None

    def is_gone(self) -> bool:
        """Whether this was a process of this machine, and has ended; a process elsewhere never counts as gone."""
        if self.space != _space():
            return False
        try:
            process = psutil.Process(self.pid)
            is_another = abs(process.create_time() - self.began) > _CLOCK_SECONDS
            return is_another or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class RankProcesses:
    """The processes of all ranks, as far as they have come to the store. Raises `RuntimeError` where the store is gone."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._missing = set(range(world_size)) - {rank}
        self._unread = _neighbours(rank, world_size) | {0} - {rank}
        self._beside: dict[int, ProcessIdentity] = {}  # of this machine
        self.first_node: str | None = (
            None  # rank 0's, which nobody can look up once the store is gone with it
        )
        store.set(_PROCESS.format(rank), json.dumps(asdict(ProcessIdentity.own())))

    def missing(self) -> list[int]:
        """The ranks that have not come so far."""
        self._missing = {rank for rank in self._missing if not self._store.check([_PROCESS.format(rank)])}
        return sorted(self._missing)

    def gone(self) -> list[int]:
        """The ranks of this machine whose processes have ended."""
        for rank in [rank for rank in self._unread if self._store.check([_PROCESS.format(rank)])]:
            self._unread.discard(rank)
            process = self._read(rank)
            if process is not None and rank == 0:
                self.first_node = process.node
            if process is not None and process.space == _space():
                self._beside[rank] = process
        return [rank for rank, process in self._beside.items() if process.is_gone()]

    def node_of(self, ranks: Collection[int]) -> str | None:
        """The node of these ranks, which have come; None where they are of several."""
        nodes = {process.node for process in map(self._read, ranks) if process is not None}
        return nodes.pop() if len(nodes) == 1 else None

    def answer(self) -> None:
        """Say that this rank lives, and knows of the failure."""
        self._store.set(_ANSWER.format(self._rank), "")

    def silent(self, *, but: Collection[int], seconds: float) -> list[int]:
        """The ranks that have not answered within so many seconds, without `but`. Returns once all have, or are gone."""
        waiting = set(range(self._world_size)) - {self._rank, *but}
        deadline = time.monotonic() + seconds
        while True:
            waiting = {rank for rank in waiting if not self._store.check([_ANSWER.format(rank)])}
            if waiting <= set(self.gone()) or time.monotonic() > deadline:
                return sorted(waiting)
            time.sleep(_POLL_SECONDS)

    def _read(self, rank: int) -> ProcessIdentity | None:
        """What a rank that has come has left; None where that is nothing of ours."""
        return ProcessIdentity.from_store(self._store.get(_PROCESS.format(rank)))


def _neighbours(rank: int, world_size: int) -> set[int]:
    """The other ranks that may be on this machine: by all launchers, a block of numbers; without their number, all."""
    per_node = launch_environment.ranks_per_node()
    first = 0 if per_node is None else rank - launch_environment.local_rank()
    last = world_size if per_node is None else min(first + per_node, world_size)
    return set(range(max(first, 0), last)) - {rank}


def is_gone(ranks: Sequence[int]) -> str:
    """A clause on the first of these ranks, whose processes have ended, to stand behind `rank N: `."""
    others = f", as are those of ranks {', '.join(map(str, ranks[1:]))}" if len(ranks) > 1 else ""
    return f"the process is gone{others}"


def are_gone(ranks: Sequence[int]) -> str:
    """A message that these ranks' processes have ended."""
    return f"rank {ranks[0]}: {is_gone(ranks)}"


def _space() -> str:
    """The running system and the container in it: the same number is another process elsewhere."""
    container = ""
    with contextlib.suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return f"{machine()} {container}"
