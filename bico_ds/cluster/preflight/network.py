"""The network under the ranks: all-reduce and all-gather over all of them, and the links between neighbouring nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from bico_ds.cluster.preflight.node_report import synchronize

ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 20}  # of fp32
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """GB/s; of both collectives bus bandwidth (nccl-tests' definition), of the links as payload one way."""

    all_reduce: float
    all_gather: float
    links: dict[tuple[str, str], float]


def measure(hosts: list[str], device: torch.device) -> NetworkReport:
    """Run both collectives and all links; called by every rank of the default group, `hosts` by rank.

    Raises RuntimeError where a collective fails or delivers wrong values.
    """
    size, elements = len(hosts), ELEMENTS[device.type]
    elements -= elements % size
    share = torch.full((elements // size,), float(dist.get_rank()), device=device)
    whole = torch.empty(elements, device=device)
    seconds = timed(lambda: dist.all_gather_into_tensor(whole, share), device)
    gathered = 4e-9 * elements * (size - 1) / size / seconds
    if not torch.equal(whole[:: elements // size].cpu(), torch.arange(float(size))):
        raise RuntimeError("all-gather delivered wrong values")
    ones = torch.ones(elements, device=device)
    dist.all_reduce(ones)
    if not bool((ones == size).all()):
        raise RuntimeError("all-reduce delivered wrong sums")
    seconds = timed(lambda: dist.all_reduce(ones), device)
    reduced = 4e-9 * elements * 2 * (size - 1) / size / seconds
    return NetworkReport(all_reduce=reduced, all_gather=gathered, links=links(hosts, device))


def links(hosts: list[str], device: torch.device) -> dict[tuple[str, str], float]:
    """GB/s between the first ranks of neighbouring nodes, around the ring, one link after the other."""
    first_ranks = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    nodes = sorted(first_ranks, key=lambda host: first_ranks[host])
    pairs = list(zip(nodes, nodes[1:] + nodes[:1], strict=True))[
        : len(nodes) if len(nodes) > 2 else len(nodes) - 1
    ]
    block, speeds = torch.ones(ELEMENTS[device.type] // 4, device=device), {}
    for source, target in pairs:
        ends = [first_ranks[source], first_ranks[target]]
        seconds = torch.zeros(1, dtype=torch.float64, device=device)
        if dist.get_rank() in ends:
            seconds += timed(partial(_there_and_back, block, ends), device, own_barrier=False)
        dist.broadcast(seconds, src=ends[0])
        speeds[source, target] = 2 * 4e-9 * block.numel() / float(seconds)
    return speeds


def timed(work: Callable[[], object], device: torch.device, *, own_barrier: bool = True) -> float:
    """Median seconds of some rounds, after one to warm up."""
    work()
    samples = []
    for _ in range(ROUNDS):
        if own_barrier:
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
