"""Small messages between ranks over torch's TCP store, which needs no process group."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bico_ds.common.errors import RunError, UserError
from bico_ds.common.json_files import JsonError, parse_json
from bico_ds.runtime.meeting.messages import FOREIGN
from bico_ds.runtime.meeting.rendezvous import open_store


class Exchange:
    """Rank 0 serves the store. Every rank posts values that rank 0 collects; rank 0 publishes values that all receive."""

    def __init__(self, *, rank: int, world_size: int, seconds: float) -> None:
        """Raises `UserError` as `open_store` does, and where rank 0 cannot be reached within `seconds`."""
        self.rank, self.world_size = rank, world_size
        self._seconds = timedelta(seconds=seconds)
        try:
            # The next port: MASTER_PORT itself must stay free for training.
            self.store = open_store(rank=rank, world_size=world_size, port_offset=1, timeout=self._seconds)
        except RunError as error:
            raise UserError(str(error)) from None
        self.store.set(f"host/{rank}", socket.gethostname())

    def post(self, name: str, value: Any) -> None:
        """Leave this rank's `value`, which JSON can hold, for rank 0."""
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str) -> tuple[list[Any], list[int]]:
        """The values that ranks posted, in the order of ranks, and the ranks that posted none in time. Rank 0 only."""
        values: list[Any] = []
        silent: list[int] = []
        for rank in range(self.world_size):
            try:
                self.store.wait([f"{name}/{rank}"], timedelta(seconds=1) if silent else self._seconds)
            except dist.DistStoreError:
                silent.append(rank)
                continue
            values.append(self._read(f"{name}/{rank}"))
        return values, silent

    def publish(self, name: str, value: Any) -> None:
        """Leave `value` for all ranks. Rank 0 only."""
        self.store.set(name, json.dumps(value))

    def receive(self, name: str) -> Any:
        """The value that rank 0 published. Raises `torch.distributed.DistStoreError` where it publishes none in time."""
        self.store.wait([name], self._seconds * 2)
        return self._read(name)

    def _read(self, name: str) -> Any:
        try:
            return parse_json(self.store.get(name), Path(name), strict=False)
        except JsonError:
            raise RunError(FOREIGN) from None
