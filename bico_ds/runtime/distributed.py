"""Ranks: joining the process group, and the few collectives that the training loop itself needs."""

from __future__ import annotations

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

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime import host_memory, launch_environment
from bico_ds.runtime.meeting.messages import Verdict
from bico_ds.runtime.meeting.processes import RankProcesses, are_gone
from bico_ds.runtime.meeting.rendezvous import LOOPBACK, open_store
from bico_ds.runtime.signals import Interrupted, StopFlag

_VERDICT, _RECEIVED = "bico_ds/verdict", "bico_ds/received"
_WAIT_SECONDS = 0.5
_RECEIVED_SECONDS = 10.0
_GROUP_MINUTES = 30.0  # torch's own for gloo: the ranks of an evaluation load weights at different speeds


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

    DeepSpeed's own DS_ACCELERATOR=cpu keeps the ranks on the CPU of a GPU machine. Raises `UserError` where the
    environment's numbers are none, or contradict one another.
    """
    launch_environment.check()
    local_rank = launch_environment.local_rank()
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "DS_ACCELERATOR='cuda' in the environment, and torch finds no CUDA device; unset it to train on the CPU"
        )
    on_cuda = torch.cuda.is_available() and accelerator != "cpu"
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    return Ranks(launch_environment.rank(), local_rank, launch_environment.world_size(), device)


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """This process among those that torchrun started, joined as long as the block runs; alone without torchrun."""
    ranks = read_ranks()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.world_size > 1:
        store = connect(ranks, timeout_minutes=_GROUP_MINUTES)
        begin_group(ranks.device, store=store, rank=ranks.rank, world_size=ranks.world_size)
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


def connect(ranks: Ranks, *, timeout_minutes: float, stop: StopFlag | None = None) -> Store:
    """Return the ranks' common store; it waits for no other rank than the first.

    Raises `UserError` where the launcher's address or port cannot be used, `RunError` where rank 0 is not reached in time,
    and `Interrupted` where it does not come soon after `stop` was set.
    """
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    timeout = timedelta(minutes=timeout_minutes)
    store = open_store(rank=ranks.rank, world_size=ranks.world_size, timeout=timeout, stop=stop)
    # DeepSpeed names its shared memory by both, also where no rank listens.
    os.environ.setdefault("MASTER_ADDR", LOOPBACK)
    if launch_environment.master_port() is None:
        os.environ["MASTER_PORT"] = str(launch_environment.free_port())
    return store


def first_alone(ranks: Ranks, store: Store, work: Callable[[RankProcesses], None]) -> None:
    """Rank 0 works, however long, while the others wait: outside of any collective, so no timeout runs.

    A `UserError` or `Interrupted` of rank 0 is raised on every rank; at anything else, its death included, the others exit.
    """
    processes = RankProcesses(store, ranks.rank, ranks.world_size)
    if not ranks.is_first:
        _await_verdict(store)
        return
    try:
        work(processes)
    except BaseException as error:
        store.set(_VERDICT, Verdict(kind=type(error).__name__, text=str(error)).to_json())
        deadline = time.monotonic() + _RECEIVED_SECONDS  # the store ends with this process
        expected = ranks.world_size - 1 - len({*processes.missing(), *processes.gone()})
        while store.add(_RECEIVED, 0) < expected and time.monotonic() < deadline:
            time.sleep(_WAIT_SECONDS / 5)
        raise
    store.set(_VERDICT, Verdict(kind="", text="").to_json())


def await_all(processes: RankProcesses, *, world_size: int, timeout_minutes: float) -> None:
    """Wait until every rank has come to the store. Raises `RunError` where one is gone, or does not come in time."""
    deadline = time.monotonic() + timeout_minutes * 60
    while missing := processes.missing():
        if gone := processes.gone():
            raise RunError(are_gone(gone))
        if time.monotonic() > deadline:
            raise RunError(
                f"{world_size - len(missing)} of {world_size} ranks came within {timeout_minutes:g} minutes "
                f"(distributed.timeout_minutes); missing: {', '.join(map(str, missing[:10]))}"
                f"{' …' if len(missing) > 10 else ''}. WORLD_SIZE says how many there are"
            )
        time.sleep(_WAIT_SECONDS / 5)


def _await_verdict(store: Store) -> None:
    try:
        while not store.check([_VERDICT]):
            time.sleep(_WAIT_SECONDS)
        verdict = Verdict.from_store(store.get(_VERDICT))
        store.add(_RECEIVED, 1)
    except RunError:
        raise
    except RuntimeError:
        raise SystemExit(f"error: {are_gone([0])}") from None
    if verdict.kind == "UserError":
        raise UserError(verdict.text)
    if verdict.kind == "Interrupted":
        raise Interrupted(verdict.text)
    if verdict.kind:
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
