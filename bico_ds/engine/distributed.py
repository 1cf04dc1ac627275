"""Ranks: joining the process group, and the few collectives that the engine itself needs."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from bico_ds.config.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks() -> Ranks:
    """Read rank and world size from the launcher's environment; without a launcher, be the only rank."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = torch.cuda.is_available()
    return Ranks(rank, local_rank, world_size, torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"))


def join(ranks: Ranks, *, timeout_minutes: float) -> None:
    """Start the process group. A rank that never comes, or hangs in a collective, fails all after the timeout."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if ranks.world_size > 1:
            raise UserError("MASTER_PORT is not set: start several ranks by deepspeed, torchrun or srun")
        os.environ["MASTER_PORT"] = str(_free_port())
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=timeout_minutes),
    )


def leave() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all ranks, in fp64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather_objects(value: Any) -> list[Any]:
    """Collect one small object from every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Give rank 0's small object to every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def die_with_parent() -> None:
    """End this rank when its launcher vanishes.

    The `deepspeed` command exits 0 and leaves its ranks running when its per-node launcher is killed (its runner looks
    at positive return codes only); an orphan would go on writing. On Linux the kernel tells; elsewhere a thread looks.
    """
    parent = os.getppid()
    PR_SET_PDEATHSIG = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass
    threading.Thread(target=_watch_parent, args=(parent,), name="parent-watch", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
