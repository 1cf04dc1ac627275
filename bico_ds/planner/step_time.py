"""How long an optimizer step takes: ranges, from peaks and assumed efficiencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.communication import Transfer, gather_all_weights, transfers
from bico_ds.planner.compute.elementwise import elementwise_bytes, optimizer_bytes
from bico_ds.planner.deployment import ELEMENT_BYTES, Deployment
from bico_ds.planner.devices import Device
from bico_ds.planner.flops import StepFlops, step_flops
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.workload import MicroBatch

# Shares of the data-sheet peaks that are reached, from publications; none is fitted to the runs that
# docs/benchmarks/planner.md compares with.
PRODUCT_EFFICIENCY = Range(0.6, 0.8)
"""Of dense bf16 products. The best shapes reach 0.80 on H100, 0.87 on A100, 0.78 on B200 and 0.60 on MI300X (Bekman, Machine
Learning Engineering, "Maximum Achievable Matmul FLOPS"); the lower bound, for the shapes of layers, is an assumption."""
ATTENTION_EFFICIENCY = Range(0.3, 0.7)
"""Of attention kernels: FlashAttention-2 on H100 0.35 and on A100 0.5 to 0.73, FlashAttention-3 on H100 up to 0.75 (arXiv
2407.08608, 2307.08691), forward; backward less, and short documents less still, by assumption."""
MEMORY_EFFICIENCY = Range(0.6, 0.9)
"""Of a device's memory bandwidth, by kernels that read and write once: an assumption (copies reach about 0.9)."""
HOST_MEMORY_BANDWIDTH = Range(1e11, 4e11)
"""Bytes per second of a node's host memory, under DeepSpeed's CPU Adam: an assumption for two sockets."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step of an objective; `flops` of all ranks and micro-batches, seconds of wall time.

    `products`, `elementwise`: of a rank's micro-batches. `optimizer`: of the update, and of
    adding up gradients. `parts` add up to `seconds`: of communication the lower bound is what is not hidden.
    `kept_per_second` counts rows through the model and `represented_per_second` original tokens, both per device; `mfu`: of
    useful operations.
    """

    objective: str
    probability: float
    flops: StepFlops
    products: Range
    elementwise: Range
    optimizer: Range
    transfers: tuple[Transfer, ...]
    parts: Mapping[StepPart, Range]
    seconds: Range
    kept_per_second: Range
    represented_per_second: Range
    mfu: Range


def step_time(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, batch: MicroBatch
) -> StepTime:
    """The time of a step whose micro-batches are all like `batch`.

    Lower bound: the highest efficiencies, and on GPUs transfers hidden behind the products as far as these last, but for the
    reduction of gradients without `overlap_comm`. Upper bound: the lowest efficiencies, and everything one after the other.
    The time of the host (Python, launches of kernels) is not planned: in micro-batches of few rows it may be most of a step.
    """
    training, device = recipe.training, deployment.device
    accumulation = micro_batches_per_rank(
        training.global_batch_bins, training.micro_batch_bins, deployment.ranks
    )
    on_cuda = device.kind == "cuda"
    flops = step_flops(architecture, recipe.model, batch, on_cuda=on_cuda)
    peak = device.peak_flops(recipe.model.dtype)
    products, elementwise = _of_products(flops, peak), _of_memory(recipe, architecture, device, batch)
    products, elementwise = (
        {part: found.times(accumulation) for part, found in parts.items()}
        for parts in (products, elementwise)
    )
    optimizer = _optimizer_seconds(recipe, architecture, deployment, accumulation)
    sent = tuple(transfers(recipe, architecture, deployment))
    if batch.repeats_base and deployment.zero.stage == 3:
        sent += (_gathered_for_base(recipe, architecture, deployment, accumulation),)
    hidden = [on_cuda and (deployment.zero.overlap_comm or not transfer.reduces) for transfer in sent]
    computed = _sum([*products.values(), *elementwise.values()])
    seconds = _together(computed, sent, optimizer, hidden)
    communication = Range(
        max(seconds.low - computed.low - optimizer.low, 0.0), sum(transfer.seconds.high for transfer in sent)
    )
    return StepTime(
        objective=batch.objective,
        probability=batch.probability,
        flops=flops.times(accumulation * deployment.ranks),
        products=_sum(products.values()),
        elementwise=_sum(elementwise.values()),
        optimizer=optimizer,
        transfers=sent,
        parts=_in_order(
            products, elementwise, {StepPart.COMMUNICATION: communication, StepPart.OPTIMIZER: optimizer}
        ),
        seconds=seconds,
        kept_per_second=_rate(accumulation * batch.rows, seconds),
        represented_per_second=_rate(accumulation * batch.tokens, seconds),
        mfu=_rate(accumulation * flops.useful / peak, seconds),
    )


def _of_products(flops: StepFlops, peak: float) -> dict[StepPart, Range]:
    return {
        StepPart.LINEAR_LAYERS: _seconds(flops.linear, peak, PRODUCT_EFFICIENCY),
        StepPart.HEAD_AND_LOSS: _seconds(flops.head, peak, PRODUCT_EFFICIENCY),
        **{part: _seconds(found, peak, ATTENTION_EFFICIENCY) for part, found in flops.of_attention.items()},
    }


def _of_memory(
    recipe: Recipe, architecture: Architecture, device: Device, batch: MicroBatch
) -> dict[StepPart, Range]:
    moved = elementwise_bytes(architecture, recipe.model, batch, on_cuda=device.kind == "cuda")
    return {
        part: _seconds(found, device.memory_bandwidth, MEMORY_EFFICIENCY) for part, found in moved.items()
    }


def _in_order(*found: Mapping[StepPart, Range]) -> dict[StepPart, Range]:
    """What several know of the parts, added up."""
    sums = {part: _sum(parts[part] for parts in found if part in parts) for part in StepPart}
    return {part: seconds for part, seconds in sums.items() if seconds.high}


def _sum(ranges: Iterable[Range]) -> Range:
    return reduce(Range.__add__, ranges, Range.exactly(0))


def _gathered_for_base(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, accumulation: int
) -> Transfer:
    """All weights once more per micro-batch, for the start model's forward pass: none is taken to be there still."""
    once = gather_all_weights(recipe.model, architecture, deployment)
    return Transfer(
        name="weights, gathered for the start model's pass",
        bytes=accumulation * once.bytes,
        seconds=once.seconds.times(accumulation),
        how=f"{accumulation} times all weights (bico_ds/model/build.py)",
    )


def _seconds(work: float, peak: float, efficiency: Range) -> Range:
    return Range(work / peak / efficiency.high, work / peak / efficiency.low)


def _rate(amount: float, seconds: Range) -> Range:
    return Range(amount / seconds.high, amount / seconds.low)


def _together(computed: Range, sent: Sequence[Transfer], optimizer: Range, hidden: Sequence[bool]) -> Range:
    """`hidden`: which transfers the lower bound takes to run beside the computation."""
    beside = sum(transfer.seconds.low for transfer, is_hidden in zip(sent, hidden, strict=True) if is_hidden)
    after = sum(transfer.seconds.low for transfer in sent) - beside
    high = computed.high + sum(transfer.seconds.high for transfer in sent)
    return Range(max(computed.low, beside) + after + optimizer.low, high + optimizer.high)


def _optimizer_seconds(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, accumulation: int
) -> Range:
    """Of the update of a rank's part and of adding up its gradients, bound by memory.

    An offloaded optimizer reads and writes its state, reads the gradient and writes the weight in the host's memory, which
    the ranks of a node share.
    """
    zero, trained = deployment.zero, architecture.trained_parameters(recipe.model.lora)
    partition, is_offloaded = trained / deployment.ranks, zero.offload_optimizer != "none"
    moved = optimizer_bytes(
        trained, recipe.model, partition=0 if is_offloaded else partition, micro_batches=accumulation
    )
    on_device = _seconds(moved, deployment.device.memory_bandwidth, MEMORY_EFFICIENCY)
    if not is_offloaded:
        return on_device
    weight_bytes = ELEMENT_BYTES[recipe.model.dtype]
    each = 2 * recipe.optimizer.state.bytes_per_parameter + zero.gradient_bytes + weight_bytes
    return on_device + _seconds(each * partition * deployment.ranks_per_node, 1.0, HOST_MEMORY_BANDWIDTH)
