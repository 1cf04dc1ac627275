"""Small messages between ranks over torch's TCP store: what works before, and without, a process group."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Exchange:
    """Rank 0 serves the store; every rank posts, rank 0 collects, everybody reads what rank 0 says."""

    def __init__(self, *, rank: int, world_size: int, address: str, port: int, seconds: float) -> None:
        """Raises RuntimeError (torch's) where rank 0 cannot be reached within `seconds`."""
        self.rank, self.world_size = rank, world_size
        self._seconds = timedelta(seconds=seconds)
        self.store = dist.TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=self._seconds, wait_for_workers=False
        )
        self.store.set(f"host/{rank}", socket.gethostname())

    def post(self, name: str, value: Any) -> None:
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str) -> tuple[list[Any], list[int]]:
        """What the ranks posted, by rank, and the ranks that posted nothing in time. Rank 0 only."""
        values: list[Any] = []
        silent: list[int] = []
        for rank in range(self.world_size):
            try:
                self.store.wait([f"{name}/{rank}"], timedelta(seconds=1) if silent else self._seconds)
            except dist.DistStoreError:
                silent.append(rank)
                continue
            values.append(json.loads(self.store.get(f"{name}/{rank}")))
        return values, silent

    def say(self, name: str, value: Any) -> None:
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """What rank 0 said. Raises `torch.distributed.DistStoreError` where it says nothing in time."""
        self.store.wait([name], self._seconds * 2)
        return json.loads(self.store.get(name))
