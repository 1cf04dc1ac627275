"""Gradients on their way to the partitions: DeepSpeed's buckets, replayed over a backward pass. Bytes per rank.

Sources: deepspeed 0.19.8, runtime/zero/stage3.py (`__add_grad_to_ipg_bucket`, `__avg_scatter_grads`),
runtime/comm/coalesced_collectives.py (`reduce_scatter_coalesced`), runtime/zero/stage_1_and_2.py
(`reduce_independent_p_g_buckets_and_remove_grads`, `reduce_ipg_grads`, `allreduce_bucket`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from bico_ds.planner.deployment import Zero
from bico_ds.planner.zero.modules import Parameter


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes at one point of the backward pass: `whole` gradients of the model's shapes, and `copies` made to reduce them."""

    whole: float
    copies: float

    @property
    def bytes(self) -> float:
        return self.whole + self.copies


class Bucket:
    """Gradients that wait to be reduced together. Those that fit lie in a buffer that is there anyway.

    `size`: bytes per element of the model's dtype. `offsets`: where each parameter begins in ZeRO-2's flat partition.
    """

    def __init__(self, zero: Zero, ranks: int, size: int, parameters: Sequence[Parameter]) -> None:
        self.zero, self.ranks, self.size = zero, ranks, size
        self.waiting: list[Parameter] = []
        trained = [parameter for parameter in parameters if parameter.trained]
        self.offsets = dict(zip(trained, [0, *accumulate(p.elements for p in trained)], strict=False))
        self.partition = partition_elements(trained, ranks)

    @property
    def elements(self) -> int:
        return sum(parameter.elements for parameter in self.waiting)

    @property
    def whole(self) -> int:
        """Bytes of gradients that wait outside of the buffer."""
        return sum(self.size * p.elements for p in self.waiting if not self._fits(p))

    def add(self, parameter: Parameter) -> Gradients:
        """Take one more gradient, which is a tensor of its own so far; return what there is while room is made for it."""
        there = self.whole + self.size * parameter.elements
        copies = 0.0
        if self.waiting and self.elements + parameter.elements > self.zero.reduce_bucket:
            copies = self.flush()
        self.waiting.append(parameter)
        return Gradients(whole=there, copies=copies)

    def flush(self) -> float:
        """Reduce what waits; return the bytes of the copies that this takes."""
        reduce = self._scattered if self.zero.stage == 3 else self._reduced
        copies = reduce() if self.waiting else 0.0
        self.waiting = []
        return copies

    def _fits(self, parameter: Parameter) -> bool:
        return self.zero.contiguous_gradients and parameter.elements <= self.zero.reduce_bucket

    def _scattered(self) -> float:
        """ZeRO-3: what is not in the buffer is converted, then all is laid out by ranks, unless it is already."""
        sent = self.zero.communication_bytes
        outside = sum(p.elements for p in self.waiting if not self._fits(p))
        converted = outside * sent if sent != self.size else 0
        in_order = len(self.waiting) == 1 and self.waiting[0].elements % self.ranks == 0
        padded = sum(p.share(self.ranks) for p in self.waiting) * self.ranks
        return converted + (0 if in_order else padded * sent)

    def _reduced(self) -> float:
        """ZeRO-2: slices by owner, flattened if they are several, and converted; a larger one goes alone."""
        most = 0.0
        batch: list[int] = []
        for number in self._slices():
            batch.append(number)
            if sum(batch) > self.zero.reduce_bucket:
                most, batch = max(most, self._flat(batch)), []
        return max(most, self._flat(batch))

    def _flat(self, slices: Sequence[int]) -> float:
        sent = self.zero.communication_bytes
        flattened = self.size if len(slices) > 1 else 0
        return sum(slices) * (flattened + (sent if sent != self.size else 0))

    def _slices(self) -> list[int]:
        """Elements of each waiting gradient by the partition that they go to."""
        found = []
        for parameter in self.waiting:
            start, end = self.offsets[parameter], self.offsets[parameter] + parameter.elements
            bounds = [start, *range((start // self.partition + 1) * self.partition, end, self.partition), end]
            found += [after - before for before, after in pairwise(bounds)]
        return found


def partition_elements(trained: Sequence[Parameter], ranks: int) -> int:
    """ZeRO-2: elements of each rank's part of all trained parameters, padded at their end to an even number per rank."""
    total = sum(parameter.elements for parameter in trained)
    return math.ceil(total / (2 * ranks)) * 2
