"""The network under the ranks: all-reduce and all-gather over all of them, and the links between neighbouring nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist

from bico_ds.runtime.device_speed import synchronize

ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 20}  # of fp32
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """Speeds in GB/s: bus bandwidth of both collectives (as nccl-tests defines it), payload in one direction of the links.

    `links`: by the two hosts.
    """

    all_reduce: float
    all_gather: float
    links: dict[tuple[str, str], float]


def measure(hosts: list[str], device: torch.device) -> NetworkReport:
    """Measure both collectives and all links; `hosts`: the ranks' hosts, by rank. Collective, in the default group.

    Raises `RuntimeError` where a collective fails or delivers wrong values.
    """
    size, elements = len(hosts), ELEMENTS[device.type]
    elements -= elements % size
    share = torch.full((elements // size,), float(dist.get_rank()), device=device)
    gathered = torch.empty(elements, device=device)
    seconds = timed(lambda: dist.all_gather_into_tensor(gathered, share), device)
    all_gather = 4e-9 * elements * (size - 1) / size / seconds
    if not torch.equal(gathered[:: elements // size].cpu(), torch.arange(float(size))):
        raise RuntimeError("all-gather delivered wrong values")
    ones = torch.ones(elements, device=device)
    dist.all_reduce(ones)
    if not bool((ones == size).all()):
        raise RuntimeError("all-reduce delivered wrong sums")
    seconds = timed(lambda: dist.all_reduce(ones), device)
    all_reduce = 4e-9 * elements * 2 * (size - 1) / size / seconds
    return NetworkReport(all_reduce=all_reduce, all_gather=all_gather, links=links(hosts, device))


def links(hosts: list[str], device: torch.device) -> dict[tuple[str, str], float]:
    """GB/s between the first ranks of neighbouring nodes, around the ring, one link after the other. Collective."""
    first_ranks = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    nodes = sorted(first_ranks, key=lambda host: first_ranks[host])
    pairs = list(pairwise(nodes))
    if len(nodes) > 2:
        pairs.append((nodes[-1], nodes[0]))
    block, speeds = torch.ones(ELEMENTS[device.type] // 4, device=device), {}
    for source, target in pairs:
        ends = [first_ranks[source], first_ranks[target]]
        seconds = torch.zeros(1, dtype=torch.float64, device=device)
        if dist.get_rank() in ends:
            seconds += timed(partial(_there_and_back, block, ends), device, with_barrier=False)
        dist.broadcast(seconds, src=ends[0])
        speeds[source, target] = 2 * 4e-9 * block.numel() / float(seconds)
    return speeds


def timed(work: Callable[[], object], device: torch.device, *, with_barrier: bool = True) -> float:
    """Median seconds of `ROUNDS` rounds, after one to warm up; `with_barrier`: all ranks start a round together."""
    work()
    samples = []
    for _ in range(ROUNDS):
        if with_barrier:
            dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def _there_and_back(block: torch.Tensor, ends: list[int]) -> None:
    if dist.get_rank() == ends[0]:
        dist.send(block, ends[1])
        dist.recv(block, ends[1])
    else:
        dist.recv(block, ends[0])
        dist.send(block, ends[0])
