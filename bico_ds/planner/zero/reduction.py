"""Gradients on their way to the partitions: DeepSpeed's buckets, replayed over a backward pass. Bytes per rank.

Sources: deepspeed 0.19.8, runtime/zero/stage3.py (`__add_grad_to_ipg_bucket`, `__avg_scatter_grads`),
runtime/comm/coalesced_collectives.py (`reduce_scatter_coalesced`), runtime/zero/stage_1_and_2.py
(`reduce_independent_p_g_buckets_and_remove_grads`, `reduce_ipg_grads`, `allreduce_bucket`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from bico_ds.planner.deployment import Zero
from bico_ds.planner.zero.modules import Parameter


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes at one point of the backward pass: `whole` gradients of the model's shapes, and `copies` made to reduce them.

    `partition`: whether ZeRO-2's tensor for what was reduced is there by then.
    """

    whole: float
    copies: float = 0.0
    partition: bool = False


class Bucket:
    """Gradients that wait to be reduced together. Those that fit lie in a buffer that is there anyway.

    `size`: bytes per element of the model's dtype. `over_gloo`: collectives are gloo's, as on CPUs.
    """

    def __init__(
        self, zero: Zero, ranks: int, size: int, parameters: Sequence[Parameter], *, over_gloo: bool
    ) -> None:
        self.zero, self.ranks, self.size, self.over_gloo = zero, ranks, size, over_gloo
        self.waiting: list[Parameter] = []
        # elements of those that wait, and of them those outside the buffer
        self.elements, self.outside = 0, 0
        self.has_partition = False
        trained = [parameter for parameter in parameters if parameter.trained]
        self.offsets = dict(zip(trained, accumulate((p.elements for p in trained), initial=0), strict=False))
        self.partition = partition_elements(trained, ranks)

    def now(self, new: float = 0.0) -> Gradients:
        """What there is, with `new` bytes of gradients that did not come here yet."""
        return Gradients(whole=self.size * self.outside + new, partition=self.has_partition)

    def add(self, parameter: Parameter) -> Gradients:
        """Take one more gradient, a tensor of its own so far; return what there is while room is made for it."""
        there = self.now(self.size * parameter.elements)
        if self.waiting and self.elements + parameter.elements > self.zero.reduce_bucket:
            there = self.flush(there)
        self.waiting.append(parameter)
        self.elements += parameter.elements
        self.outside += 0 if self._fits(parameter) else parameter.elements
        return there

    def flush(self, there: Gradients) -> Gradients:
        """Reduce what waits; return what there is meanwhile, beside what is `there`."""
        if not self.waiting:
            return there
        copies = self._scattered() if self.zero.stage == 3 else self._reduced()
        # An fp32 partition is added to while the copies are there; one of the model's type is made after them.
        at_once = self.zero.gradient_bytes != self.size
        there = replace(there, copies=copies, partition=self.has_partition or at_once)
        self.waiting, self.elements, self.outside, self.has_partition = [], 0, 0, True
        return there

    def _fits(self, parameter: Parameter) -> bool:
        return self.zero.contiguous_gradients and parameter.elements <= self.zero.reduce_bucket

    def _scattered(self) -> float:
        """ZeRO-3: what is not in the buffer is converted, then all is laid out by ranks, unless it is already.

        Gloo reduces a clone of it (torch's ProcessGroupGloo, `reduce_scatter_tensor_coalesced`).
        """
        sent = self.zero.communication_bytes
        converted = self.outside * sent if sent != self.size else 0
        in_order = len(self.waiting) == 1 and self.waiting[0].elements % self.ranks == 0
        padded = sum(p.share(self.ranks) for p in self.waiting) * self.ranks
        laid_out = 0 if in_order else padded * sent
        return converted + laid_out + (padded * sent if self.over_gloo else 0)

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
