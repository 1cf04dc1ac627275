"""Host memory and NVMe of a node, and disk for checkpoints, export and conversion.

Read in DeepSpeed 0.19.8 and torch 2.13: "DeepSpeed: FILE" below is a file of `deepspeed/runtime`. What a resume, a load or
a conversion takes for a while is in the upper bound alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import ELEMENT_BYTES, Deployment, Offload, Zero
from bico_ds.planner.items import Item
from bico_ds.planner.ranges import Range

_FP32 = 4
# A rank's anonymous memory after its imports: 0.36 GB measured on a CPU (torch 2.13); above it what CUDA's libraries and
# context take, which is an assumption.
_PROCESS = {"cpu": Range.exactly(0.36e9), "cuda": Range(0.36e9, 3e9)}
# Tensors of a `PackedBatch` with its plan and layout, per token: 48 to 53 measured, in NTP and BICO steps of the embedded
# task.
_BATCH_BYTES = Range(45.0, 60.0)
# DeepSpeed's all-reduce on CPUs maps a buffer of so many bytes per rank (`bico_ds.runtime.host_memory`).
_SHARED_BUFFER = 66 * 2**20
# DeepSpeed: swap_tensor/utils.py. What is smaller stays in host memory; files are multiples of the other.
_LEAST_SWAPPED, _SWAP_ALIGNMENT = 2**20, 1024
# DeepSpeed: zero/offload_config.py, where no key is given: elements of weights on NVMe that are in host memory.
_PARAMETERS_IN_HOST, _PARAMETER_BUFFERS = 1e9, 5 * 1e8
_BEST = "kept by checkpoint.keep_best where it is none of the last"
_CONVERSION = 2  # times a checkpoint: `bico_ds.checkpoint.universal`


def checkpoint_bytes(recipe: Recipe, architecture: Architecture, zero: Zero) -> float:
    """Bytes of one checkpoint on disk, over all ranks, without names and headers (a few kB per tensor and rank).

    Of trained parameters alone: the optimizer's state (12 bytes with AdamW, the master weight among them), and below stage 3
    the weight in its own dtype, which under stage 3 only the master weight stands for. A frozen base is left out.
    Source: `Checkpointer` (`exclude_frozen`); DeepSpeed: engine.py, `_save_checkpoint`, `_save_zero_checkpoint`, and for
    NVMe `save_checkpoint`, which copies the swap files without those of gradients.
    """
    weight = 0 if zero.stage == 3 else ELEMENT_BYTES[recipe.model.dtype]
    each = recipe.optimizer.state.bytes_per_parameter + weight
    return float(each * architecture.trained_parameters(recipe.model.lora))


def export_bytes(recipe: Recipe, architecture: Architecture) -> float:
    """Bytes of a run's export: all weights in the model's dtype, a tied head once; or its adapters alone."""
    lora = recipe.model.lora if recipe.exports_adapters else None
    return float(ELEMENT_BYTES[recipe.model.dtype] * architecture.trained_parameters(lora))


def disk(recipe: Recipe, architecture: Architecture, zero: Zero, steps: int | None) -> tuple[Item, ...]:
    """Of the run folder after `steps`, where they are known. Source: `Checkpointer._prune`: old checkpoints go when a new
    one is complete.
    """
    spec, one = recipe.checkpoint, checkpoint_bytes(recipe, architecture, zero)
    written, forever = _checkpoint_counts(recipe, steps)
    last = min(spec.keep_last, written)
    # Where an evaluation is the best one so far, its step gets a checkpoint, too.
    most = written if spec.keep_best is None else math.inf
    kept = Range(max(last, forever), min(min(spec.keep_last, most) + forever, most))
    how = f"the last {spec.keep_last}"
    if spec.keep_every_steps is not None:
        how += f", and every {spec.keep_every_steps:,} steps one that stays"
        how += " (not counted, as the steps are not known here)" if steps is None else ""
    best = [] if spec.keep_best is None else [Item(name="best checkpoint", bytes=Range(0, one), how=_BEST)]
    items = [
        Item(name="checkpoints", bytes=kept.times(one), how=how),
        *best,
        Item(name="checkpoint being written", bytes=Range(0 if written == 1 else one, one)),
        Item(
            name="conversion to another number of ranks",
            bytes=Range(0, _CONVERSION * one),
            how="at a resume: twice a checkpoint meanwhile, once afterwards",
        ),
    ]
    if spec.export:
        size = export_bytes(recipe, architecture)
        what = "adapters" if recipe.exports_adapters else "all weights"
        items.append(_exactly("export", size, f"{what}, {recipe.model.dtype}"))
    return tuple(items)


def _checkpoint_counts(recipe: Recipe, steps: int | None) -> tuple[float, int]:
    """Checkpoints that a run writes, and how many are never deleted: none is counted where its steps are not known."""
    spec = recipe.checkpoint
    if spec.every_steps is None:
        return 1, 0
    if steps is None:
        return math.inf, 0
    forever = math.lcm(spec.every_steps, spec.keep_every_steps) if spec.keep_every_steps else steps + 1
    return math.ceil(steps / spec.every_steps), steps // forever


def nvme(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Item, ...]:
    """Of one node: DeepSpeed's swap files; nothing where it offloads nothing to NVMe.

    Source: DeepSpeed: swap_tensor/optimizer_utils.py: a file per sub-group and state, and one per gradient, each at least
    1 MiB; swap_tensor/partitioned_param_swapper.py for weights.
    """
    zero, ranks = deployment.zero, deployment.ranks_per_node
    partitions = _partitions(recipe, architecture, deployment)
    items = []
    if zero.offload_optimizer == "nvme":
        groups = [size for size in _sub_groups(partitions, zero.sub_group_size) if _is_swapped(size)]
        states = 1 + len(recipe.optimizer.state.moments)
        items += [
            _exactly("master weights and moments", ranks * states * sum(map(_swapped_bytes, groups)), "fp32"),
            _exactly(
                "gradients", ranks * sum(_FP32 * size for size in partitions if _is_swapped(size)), "fp32"
            ),
        ]
    if zero.offload_parameters == "nvme":
        size = ELEMENT_BYTES[recipe.model.dtype] * architecture.parameters / deployment.nodes
        items.append(Item(name="weights", bytes=Range(0, size), how="those beyond max_in_cpu"))
    return tuple(items)


def host_memory(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Item, ...]:
    """Of one node, all its ranks; where they compute on CPUs, beside what the plan of their devices' memory has.

    Not counted: pages of files (the system takes them back), and the loader's tables, a few dozen bytes per document.
    """
    ranks, kind = deployment.ranks_per_node, deployment.device.kind
    items = [
        Item(
            name="processes",
            bytes=_PROCESS[kind].times(ranks),
            how="Python, torch, DeepSpeed, CUDA",
            is_tensor=False,
        ),
        _batches(recipe, deployment),
        *_offloaded_states(recipe, architecture, deployment),
        *_offloaded_weights(recipe, architecture, deployment),
        _on_the_way(recipe, architecture, deployment),
        _resume(recipe, architecture, deployment),
    ]
    if kind == "cpu":
        buffers = Range.exactly(ranks * _SHARED_BUFFER)
        items.append(Item(name="all-reduce buffers", bytes=buffers, how="in /dev/shm", is_tensor=False))
    return tuple(item for item in items if item.bytes.high > 0)


def _batches(recipe: Recipe, deployment: Deployment) -> Item:
    """The step before (until it is reported), the one that is trained, the next one, and two per worker ahead.

    Source: `bico_ds.training.trainer`, `bico_ds.data.loading.prefetch`.
    """
    steps = 2 * recipe.data.workers + 3
    tokens = recipe.training.global_batch_bins * recipe.data.capacity / deployment.nodes
    return Item(
        name="batches", bytes=_BATCH_BYTES.times(steps * tokens), how=f"{steps} steps ahead or under way"
    )


def _offloaded_states(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[Item]:
    zero = deployment.zero
    if zero.offload_optimizer == "none" or _is_on_device(deployment, zero.offload_optimizer):
        return []
    if zero.stage == 3:
        return _offloaded_by_stage_3(recipe, architecture, deployment)
    return _offloaded_by_stage_2(recipe, architecture, deployment)


def _offloaded_by_stage_3(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[Item]:
    """Source: DeepSpeed: zero/stage3.py, `_create_fp32_partitions` (masters), `_setup_for_real_optimizer` (gradients in one
    flat buffer), `initialize_optimizer_states` (gradients again, per sub-group); ops/adam/cpu_adam.py (moments, made by the
    first update). With NVMe: swap_tensor/utils.py, `SwapBufferManager`; sub-groups below 1 MiB stay here.
    """
    zero, ranks, pinned = deployment.zero, deployment.ranks_per_node, _pins(deployment)
    partitions = _partitions(recipe, architecture, deployment)
    groups = _sub_groups(partitions, zero.sub_group_size)
    on_nvme = zero.offload_optimizer == "nvme"
    here = [size for size in groups if not (on_nvme and _is_swapped(size))]
    flat = [zero.gradient_bytes * sum(partitions)]
    items = [
        _exactly(
            "master weights and moments",
            ranks * recipe.optimizer.state.bytes_per_parameter * sum(here),
            "fp32",
        ),
        _pinned("gradients, one flat buffer", flat, ranks, pinned),
        _pinned("gradients, for the optimizer", [_FP32 * size for size in here], ranks, pinned),
    ]
    if on_nvme:
        buffers = ranks * zero.buffer_count * _swapped_bytes(max(groups))
        items.append(_exactly("buffers for NVMe", buffers, f"{zero.buffer_count} of the largest sub-group"))
    return items


def _offloaded_by_stage_2(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[Item]:
    """Source: DeepSpeed: zero/stage_1_and_2.py, `__init__` (masters, a copy of the weights, a buffer as large as the largest
    parameter), `initialize_optimizer_states` (gradients), `async_accumulate_grad_in_cpu_via_gpu` (sums over micro-batches).
    """
    ranks, pinned, weight = deployment.ranks_per_node, _pins(deployment), ELEMENT_BYTES[recipe.model.dtype]
    sizes = architecture.trained_sizes(recipe.model.lora)
    partition = -(-sum(sizes) // deployment.ranks)
    moments = sum(recipe.optimizer.state.moments.values())
    items = [
        _exactly("moments", ranks * moments * partition, "fp32"),
        _pinned("master weights", [recipe.optimizer.state.master * partition], ranks, pinned),
        _pinned("gradients", [_FP32 * partition], ranks, pinned),
        _pinned("weights on their way back", [weight * partition, weight * max(sizes)], ranks, pinned),
    ]
    training = recipe.training
    if training.global_batch_bins > training.micro_batch_bins * deployment.ranks:
        sums = _pinned("sums over micro-batches", [weight * size for size in sizes], 1, pinned)
        items.append(Item(name=sums.name, bytes=sums.bytes.times(ranks / deployment.ranks), how=sums.how))
    return items


def _offloaded_weights(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[Item]:
    """Source: DeepSpeed: zero/stage3.py, `_create_param_groups_fp16_flat_cpu_memory`; with NVMe also
    swap_tensor/partitioned_param_swapper.py, at the default max_in_cpu, buffer_count and buffer_size.
    """
    zero, ranks, weight = deployment.zero, deployment.ranks_per_node, ELEMENT_BYTES[recipe.model.dtype]
    partition = architecture.parameters / deployment.ranks
    if zero.offload_parameters == "none" or _is_on_device(deployment, zero.offload_parameters):
        return []
    if zero.offload_parameters == "cpu":
        return [_pinned("weights", [math.ceil(weight * partition)], ranks, _pins(deployment))]
    most = ranks * weight * (min(partition, _PARAMETERS_IN_HOST) + _PARAMETER_BUFFERS)
    return [Item(name="weights", bytes=Range(0, most), how="up to max_in_cpu, and buffers for NVMe")]


def _on_the_way(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> Item:
    """A tensor that is in host memory while it is read or written: one per rank at a time.

    Source: `bico_ds.model.weights.materialize` (a rank's slice of a parameter; all of it below stage 3 and with hpZ);
    torch.save, which copies one storage at a time from a GPU (DeepSpeed's are as large as a sub-group).
    """
    zero, ranks = deployment.zero, deployment.ranks_per_node
    whole = zero.stage < 3 or zero.secondary_ranks is not None
    largest = max(architecture.trained_sizes(None)) / (1 if whole else deployment.ranks)
    read, written = ELEMENT_BYTES[recipe.model.dtype] * largest, 0
    if zero.offload_optimizer == "none" and deployment.device.kind == "cuda":
        partitions = _partitions(recipe, architecture, deployment)
        written = _FP32 * max(_sub_groups(partitions, zero.sub_group_size if zero.stage == 3 else None))
    most = ranks * max(read, written)
    return Item(
        name="a tensor on its way", bytes=Range(0, most), how="while weights load, or states are saved"
    )


def _resume(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> Item:
    """What of a checkpoint is in memory while a resume reads it: each rank its own file, below stage 3 also the weights.

    Source: DeepSpeed: engine.py, `_load_checkpoint` and `_get_all_zero_checkpoint_state_dicts`. Under offload the loaded
    moments become the live ones (torch.optim.Optimizer.load_state_dict copies none), and only the masters are there twice;
    those on NVMe are copied from file to file.
    """
    zero, state = deployment.zero, recipe.optimizer.state
    trained = architecture.trained_parameters(recipe.model.lora)
    each = {"none": state.bytes_per_parameter, "cpu": state.master, "nvme": 0}[zero.offload_optimizer]
    weights = (
        0 if zero.stage == 3 else deployment.ranks_per_node * ELEMENT_BYTES[recipe.model.dtype] * trained
    )
    most = each * trained / deployment.nodes + weights
    return Item(name="checkpoint", bytes=Range(0, most), how="while a resume reads it")


def _partitions(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> list[int]:
    """Elements of a rank's part of each trained parameter. Source: DeepSpeed: zero/partition_parameters.py, `_partition`."""
    return [-(-size // deployment.ranks) for size in architecture.trained_sizes(recipe.model.lora)]


def _sub_groups(partitions: Sequence[int], least: int | None) -> list[int]:
    """Elements of each sub-group. Source: DeepSpeed: zero/stage3.py, `_create_fp16_sub_groups`."""
    if least is None or least >= sum(partitions):
        return [sum(partitions)]
    groups, size = [], 0
    for partition in partitions:
        size += partition
        if size >= least:
            groups.append(size)
            size = 0
    return groups + [size] * (size > 0)


def _is_on_device(deployment: Deployment, offload: Offload) -> bool:
    """Whether the plan of the device's memory has what is offloaded to the host, which on CPUs is the device."""
    return offload == "cpu" and deployment.device.kind == "cpu"


def _pins(deployment: Deployment) -> bool:
    """On CPUs DeepSpeed locks no page, whatever `pin_memory` says (accelerator/cpu_accelerator.py)."""
    return deployment.zero.pin_memory and deployment.device.kind == "cuda"


def _is_swapped(elements: int) -> bool:
    return _FP32 * elements >= _LEAST_SWAPPED


def _swapped_bytes(elements: int) -> int:
    return -(-_FP32 * elements // _SWAP_ALIGNMENT) * _SWAP_ALIGNMENT


def _exactly(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)


def _pinned(name: str, sizes: Iterable[int], ranks: int, pinned: bool) -> Item:
    """Allocations of these bytes by every rank, page-locked or not.

    The upper bound is torch's rounding of each page-locked allocation to a power of two (`CachingHostAllocator`), which
    PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb prevents for larger ones.
    """
    sizes = list(sizes)
    most = sum(1 << (size - 1).bit_length() for size in sizes) if pinned else sum(sizes)
    how = "page-locked, up to the next power of two" if pinned else "not page-locked"
    return Item(name=name, bytes=Range(sum(sizes), most).times(ranks), how=how)
