"""Assign the bins of a global batch to ranks and their micro-batches, balanced by attention cost."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def assign_to_ranks(
    cost: NDArray[np.integer], *, micro_batch_bins: int, world_size: int
) -> NDArray[np.int64]:
    """Return the bins of each rank's micro-batches, int64 [world_size, rounds, micro_batch_bins].

    `cost` [bins of the global batch] is the attention cost of each. Ranks run round r together (ZeRO-3 gathers each layer
    for all of them), so a round waits for its most expensive micro-batch: micro-batches of similar cost share a round, and
    in it the most expensive one goes to the rank with the least cost so far. Greedy, longest first (Graham 1969); the
    result depends on the arguments alone.
    """
    assert len(cost) % (micro_batch_bins * world_size) == 0, (len(cost), micro_batch_bins, world_size)
    micro_batches = _group(cost, micro_batch_bins)
    micro_cost = cost[micro_batches].sum(axis=1)
    rounds = np.argsort(-micro_cost, kind="stable").reshape(-1, world_size)
    assigned = np.empty((world_size, len(rounds)), dtype=np.int64)
    load = np.zeros(world_size, dtype=np.int64)
    for number, members in enumerate(rounds):  # members: the most expensive first
        ranks = np.argsort(load, kind="stable")
        assigned[ranks, number] = members
        load[ranks] += micro_cost[members]
    return micro_batches[assigned]


def _group(cost: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Group bins into groups of `size` with similar sums: the most expensive bin goes to the cheapest group with room."""
    order = np.argsort(-cost, kind="stable")
    if size == 1:
        return order[:, None]
    groups = np.empty((len(cost) // size, size), dtype=np.int64)
    # (cost, group, bins in it)
    open_groups = [(0, number, 0) for number in range(len(groups))]
    for bin_ in order.tolist():
        load, number, filled = heapq.heappop(open_groups)
        groups[number, filled] = bin_
        if filled + 1 < size:
            heapq.heappush(open_groups, (load + int(cost[bin_]), number, filled + 1))
    return groups
