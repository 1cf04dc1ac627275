"""A rank's part of the prompts: its batches, and what all ranks that evaluate one model agree on.

Every rank has the same number of batches. With `synced`, ranks also run the same number of forward passes in each batch and
stop together. ZeRO-3 needs this while the weights are partitioned, because each forward pass gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

T = TypeVar("T")

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PromptShare:
    """Which part of an evaluation this rank computes, and how. Results do not depend on it, except for rounding.

    `synced`: forward passes are collectives (ZeRO-3 with partitioned weights). `batch_size`: sequences per forward pass.
    `should_stop` is polled before each forward pass; where it was true on any rank, no rank has a result. `on_batch(n)` is
    called after each of this rank's batches with the number of sequences in it.
    """

    rank: int = 0
    world_size: int = 1
    synced: bool = False
    device: torch.device = _CPU
    batch_size: int = 32
    should_stop: Callable[[], bool] = lambda: False
    on_batch: Callable[[int], None] = lambda sequences: None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ONE_PROCESS = PromptShare()  # one process, on the CPU


def shared_batches(sequences: Sequence[Sequence[int]], share: PromptShare) -> list[NDArray[np.int64]]:
    """This rank's batches: indices into `sequences`, similar lengths together, the same number of batches on every rank.

    A batch that would be empty repeats the shortest sequence; results are keyed by index, so a repeat changes nothing.
    """
    order = np.argsort([len(ids) for ids in sequences], kind="stable").astype(np.int64)
    rounds = -(-len(order) // (share.batch_size * share.world_size))
    batches = np.array_split(order, rounds * share.world_size)[share.rank :: share.world_size]
    return [batch if len(batch) else order[:1] for batch in batches]


def agree(finished: bool, share: PromptShare) -> tuple[bool, bool]:
    """(all ranks have finished, any rank must stop) where forward passes are collectives; else what this rank knows.

    Polls `share.should_stop`.
    """
    stop = share.should_stop()
    if not share.synced or share.world_size == 1:
        return finished, stop
    votes = torch.tensor([int(not finished), int(stop)], device=share.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return not votes[0].item(), bool(votes[1].item())


def gather_from_ranks(value: Any, share: PromptShare) -> list[Any]:
    """`value` of every rank, by rank, on every rank. Collective."""
    if share.world_size == 1:
        return [value]
    values: list[Any] = [None] * share.world_size
    dist.all_gather_object(values, value)
    return values


def in_order(own: dict[int, T], count: int, share: PromptShare, *, stopped: bool) -> list[T] | None:
    """What all ranks have found for `count` sequences, in their order, on every rank; None where any has `stopped`.

    `own`: what this rank has found, by the index of the sequence. Collective.
    """
    gathered = gather_from_ranks((own, stopped), share)
    if any(rank_stopped for _, rank_stopped in gathered):
        return None
    everything: dict[int, T] = {index: found for part, _ in gathered for index, found in part.items()}
    return [everything[index] for index in range(count)]
