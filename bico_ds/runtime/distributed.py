"""Ranks: joining the process group, and the few collectives that the training loop itself needs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from bico_ds.common.errors import UserError
from bico_ds.runtime import host_memory, launch_environment
from bico_ds.runtime.signals import Interrupted

_VERDICT, _RECEIVED = "bico_ds/verdict", "bico_ds/received"
_WAIT_SECONDS = 0.5
_RECEIVED_SECONDS = 10.0


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
    """Read rank and world size from the launcher's environment; without a launcher, be the only rank.

    DeepSpeed's own DS_ACCELERATOR=cpu keeps the ranks on the CPU of a GPU machine.
    """
    local_rank = launch_environment.local_rank()
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    return Ranks(launch_environment.rank(), local_rank, launch_environment.world_size(), device)


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """This process among those that torchrun started, joined as long as the block runs; alone without torchrun."""
    ranks = read_ranks()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.world_size > 1:
        begin_group(ranks.device)
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def begin_group(device: torch.device, **options: Any) -> None:
    """Start the process group of this rank's device; `options`: further ones of torch's `init_process_group`.

    NCCL is bound to the device: it guesses otherwise from the global rank, and may wait for ever at the first barrier.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


def connect(ranks: Ranks, *, timeout_minutes: float) -> Store:
    """Return the ranks' common store, once all are connected. A rank that never connects fails all after the timeout.

    Raises `UserError` where there are several ranks and no launcher has set the address of the first.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if ranks.world_size > 1:
            raise UserError("MASTER_PORT is not set: start several ranks by deepspeed, torchrun or srun")
        os.environ["MASTER_PORT"] = str(launch_environment.free_port())
    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
    return store


def first_alone(ranks: Ranks, store: Store, work: Callable[[], None]) -> None:
    """Rank 0 works, however long, while the others wait: outside of any collective, so no timeout runs.

    A `UserError` or `Interrupted` of rank 0 is raised on every rank; at anything else, its death included, the others exit.
    """
    if not ranks.is_first:
        _await_verdict(store)
        return
    try:
        work()
    except BaseException as error:
        store.set(_VERDICT, json.dumps([type(error).__name__, str(error)]))
        deadline = time.monotonic() + _RECEIVED_SECONDS  # the store ends with this process
        while store.add(_RECEIVED, 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(_WAIT_SECONDS / 5)
        raise
    store.set(_VERDICT, json.dumps(["", ""]))


def _await_verdict(store: Store) -> None:
    try:
        while not store.check([_VERDICT]):
            time.sleep(_WAIT_SECONDS)
        kind, text = json.loads(store.get(_VERDICT))
        store.add(_RECEIVED, 1)
    except RuntimeError:
        raise SystemExit("the first rank is gone") from None
    if kind == "UserError":
        raise UserError(text)
    if kind == "Interrupted":
        raise Interrupted(text)
    if kind:
        raise SystemExit(1)  # the first rank reports why


def join(ranks: Ranks, store: Store, *, timeout_minutes: float) -> None:
    """Start the process group. A collective that a rank never enters fails on all after the timeout."""
    import deepspeed

    timeout = timedelta(minutes=timeout_minutes)
    begin_group(ranks.device, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    dist.barrier()
    host_memory.unlink_shared_buffer(ranks.rank)


def leave() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(
    values: Sequence[float], device: torch.device, on_device: torch.Tensor | None = None
) -> list[float]:
    """Sum a few numbers over all ranks, in fp64: `values`, then those of `on_device` fp64 [N]. Waits for the device once."""
    # From page-locked memory and not at once: else the copy would wait for the device, too.
    on_host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    numbers = on_host.to(device, non_blocking=True)
    if on_device is not None:
        numbers = torch.cat([numbers, on_device])
    dist.all_reduce(numbers)
    return numbers.tolist()


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
