"""What DeepSpeed keeps on a rank's device between steps, and what a step of the optimizer needs besides. Bytes.

The division over ranks is that of the ZeRO paper (arXiv 1910.02054, section 5: 2 bytes of weights, 2 of gradients and 12
of optimizer states per parameter); what each term is here follows deepspeed 0.19.8, by file and function in `how`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from bico_ds.config.optimizers import OptimizerState
from bico_ds.planner.deployment import Deployment, Offload, Zero
from bico_ds.planner.items import Item
from bico_ds.planner.ranges import Range
from bico_ds.planner.zero.modules import Parameter
from bico_ds.planner.zero.reduction import partition_elements

_FP32, _FP64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class States:
    """The parameters of a model as ZeRO divides them. `size`: bytes per element of the model's dtype."""

    parameters: Sequence[Parameter]
    optimizer: OptimizerState
    deployment: Deployment
    size: int
    micro_batches: int

    @property
    def zero(self) -> Zero:
        return self.deployment.zero

    @property
    def ranks(self) -> int:
        return self.deployment.ranks

    @property
    def over_gloo(self) -> bool:
        """Whether ranks communicate over gloo, which copies what it sends, as on CPUs."""
        return self.deployment.device.kind == "cpu"

    @cached_property
    def trained(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.trained]

    @cached_property
    def frozen(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if not parameter.trained]

    @cached_property
    def partition(self) -> int:
        """Trained elements whose master this rank has."""
        if self.zero.stage == 3:
            return sum(parameter.share(self.ranks) for parameter in self.trained)
        return partition_elements(self.trained, self.ranks)

    @property
    def holds_states(self) -> bool:
        """Whether masters and moments are on the device; on CPUs the host's memory is the device's."""
        return self._is_here(self.zero.offload_optimizer)

    def _is_here(self, offload: Offload) -> bool:
        return offload == "none" or (offload == "cpu" and self.deployment.device.kind == "cpu")

    @property
    def holds_gradients(self) -> bool:
        """Whether the accumulated ones of ZeRO-3 are: offloaded to NVMe, too, they are in the host's memory."""
        return self.zero.offload_optimizer == "none" or self.deployment.device.kind == "cpu"

    def resident(self) -> Iterator[Item]:
        """Between steps."""
        yield from self._weights()
        if self.ranks > 1 and self.zero.stage == 3:
            small = [p for p in self.parameters if self._is_small(p)]
            padded = sum(p.share(self.ranks) for p in small) * self.ranks
            yield _item(
                "persistent parameters",
                self.size * padded,
                "stage3_param_persistence_threshold: never released",
            )
        if self.holds_states:
            states = self.optimizer
            yield _item(
                "master weights",
                states.master * self.partition,
                "fp32 copy: stage3.py _create_fp32_partitions",
            )
            moments = sum(states.moments.values())
            yield _item("optimizer's moments", moments * self.partition, ", ".join(states.moments))
        if self.holds_states and self.zero.offload_optimizer == "cpu":
            yield _item(
                "gradients of the optimizer", _FP32 * self.partition, "stage3.py initialize_optimizer_states"
            )
        if self.zero.stage == 3:
            if self.holds_gradients:
                size = self.zero.gradient_bytes * self.partition
                yield _item(
                    "accumulated gradients", size, "stage3.py grad_partitions_flat_buffer: always there"
                )
            if self.zero.contiguous_gradients:
                size = self.zero.communication_bytes * self.zero.reduce_bucket
                yield _item(
                    "reduce bucket", size, "stage3.py _setup_for_real_optimizer, in the type of communication"
                )
        if self.zero.secondary_ranks is not None:
            frozen = sum(p.share(self.ranks) * self.ranks for p in self.frozen)
            yield self._second("second partition of frozen weights", frozen)

    def _weights(self) -> Iterator[Item]:
        if self.zero.stage < 3:
            padded = self.partition * self.ranks
            yield _item(
                "weights", self.size * padded, "stage_1_and_2.py bit16_groups_flat: all on every rank"
            )
            frozen = sum(parameter.elements for parameter in self.frozen)
            yield _item("frozen weights", self.size * frozen, "all on every rank")
        elif self._is_here(self.zero.offload_parameters):
            yield _item("weights, partition", self.size * self.partition, "stage3.py lp_param_buffer")
            frozen = sum(parameter.share(self.ranks) for parameter in self.frozen)
            yield _item("frozen weights, partition", self.size * frozen, "partition_parameters.py ds_tensor")

    def second_partition(self, let_go: int) -> Iterator[Item]:
        """HpZ's of trained weights, where `let_go` elements of them were let go in this micro-batch (`gathering.Held`).

        A weight gets it when it is let go for the first time in a step, and loses it after the update.
        """
        if self.zero.secondary_ranks is not None:
            elements = self._gathered_trained if self.micro_batches > 1 else let_go
            yield self._second("second partition of weights", elements)

    @cached_property
    def _gathered_trained(self) -> int:
        """Trained elements, padded, that are gathered and let go; asked for at every moment of a plan."""
        return sum(p.share(self.ranks) * self.ranks for p in self.trained if not self._is_small(p))

    def _second(self, name: str, elements: int) -> Item:
        size = self.size * elements / (self.zero.secondary_ranks or 1)
        return _item(name, size, "partition_parameters.py _partition_param_sec (ZeRO++, arXiv 2306.10209)")

    def _is_small(self, parameter: Parameter) -> bool:
        return parameter.elements <= self.zero.persistence_threshold

    def of_forward(self) -> Iterator[Item]:
        """What the first micro-batches of a step leave for the next one's forward pass."""
        if self.micro_batches > 1 and self.zero.stage < 3:
            yield self._averaged(copies=1)

    def of_backward(self, *, partition: bool) -> Iterator[Item]:
        """Buffers of a backward pass; `partition`: that of ZeRO-2's reduced gradients is there already."""
        if self.zero.stage < 3:
            if self.zero.contiguous_gradients:
                buffers = 2 if self.zero.overlap_comm else 1
                size = self.size * self.zero.reduce_bucket * buffers
                yield _item(
                    "reduce bucket", size, f"stage_1_and_2.py setup_buckets: {buffers} in the model's type"
                )
            yield self._averaged(copies=int(partition) + (self.micro_batches > 1))

    def of_streams(self, largest: int, *, backward: bool) -> Iterator[Item]:
        """What `overlap_comm` may keep on a GPU under ZeRO-3 after its last use; `largest`: elements of a layer's largest.

        A tensor that two streams use is free when both are past it (`record_stream`). The host runs ahead until it waits for
        the oldest of three gatherings, or of three reductions: weights and gradients of two of each are still there.
        """
        zero = self.zero
        if zero.stage == 3 and zero.overlap_comm and self.ranks > 1 and self.deployment.device.kind == "cuda":
            ahead = 2 * max(zero.prefetch_bucket, largest)
            if backward:
                ahead += 2 * max(zero.reduce_bucket, largest)
            how = "overlap_comm: stage3.py max_param_reduce_events, partitioned_param_coordinator.py"
            kept = Range(0.0, float(self.size * ahead))
            yield Item(name="kept for a second stream", bytes=kept, how=how, is_tensor=False)

    @property
    def _is_compact(self) -> bool:
        """Whether ZeRO-2 accumulates in an fp32 partition, beside a model in 16 bits."""
        return self.zero.gradient_bytes == _FP32 and self.size != _FP32

    def _averaged(self, copies: int) -> Item:
        name = "averaged gradients"
        if self._is_compact:
            size = self.zero.gradient_bytes * self.partition * min(copies, 1)
            return _item(name, size, "stage_1_and_2.py _build_compact_grad_partition_buffer")
        size = copies * self.zero.gradient_bytes * self._owned
        return _item(name, size, f"stage_1_and_2.py grads_in_partition, {copies} of them, whole parameters")

    @cached_property
    def _owned(self) -> int:
        """Elements of the parameters that lie in a rank's partition, in whole or in part, on the rank with the most."""
        found, offset = [0] * self.ranks, 0
        for parameter in self.trained:
            first, last = offset // self.partition, (offset + parameter.elements - 1) // self.partition
            for rank in range(first, last + 1):
                found[rank] += parameter.elements
            offset += parameter.elements
        return max(found)

    def of_step(self) -> Iterator[Item]:
        """What the optimizer's step needs besides: the norm's conversion of one parameter, then a flat copy."""
        if self.zero.offload_optimizer != "none":
            return
        if self.zero.stage == 3:
            largest = max(parameter.share(self.ranks) for parameter in self.trained)
            flat = _FP32 * self._largest_sub_group()
            how = "stage3.py _prepare_fp32_grad_for_sub_group"
        else:
            yield self._averaged(copies=1)
            largest = min(self.partition, max(parameter.elements for parameter in self.trained))
            flat = 0 if self._is_compact else _FP32 * self.partition
            how = "stage_1_and_2.py step"
        norm = _FP64 * largest
        name = "gradients, flat" if flat >= norm else "a gradient in fp64"
        yield _item(name, max(norm, flat), how if flat >= norm else "get_grad_norm_direct")

    def _largest_sub_group(self) -> int:
        largest = current = 0
        for parameter in self.trained:
            current += parameter.share(self.ranks)
            largest = max(largest, current)
            current = 0 if current >= self.zero.sub_group_size else current
        return largest


def _item(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)
