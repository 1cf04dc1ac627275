"""What the ranks of an optimizer step send each other and their hosts, and how long the links take.

What DeepSpeed 0.19.8 sends (`tests/distributed/test_planned_communication.py` counts it on real ranks):

- ZeRO-3 gathers weights for each pass that reads them, and reduce-scatters gradients in every micro-batch (ZeRO paper, arXiv
  1910.02054, section 7). Which weights are still there from an earlier pass is decided by `PartitionedParameterCoordinator`,
  which `planner/zero/gathering.py` replays. Small weights stay, and are gathered once after the step.
- ZeRO-2 all-reduces gradients in every micro-batch, although a rank keeps a part only (`use_multi_rank_bucket_allreduce` of
  runtime/zero/stage_1_and_2.py), and gathers the updated weights after the step.
- Frozen weights have no gradient. With hpZ (ZeRO++, arXiv 2306.10209, section 3.2) a weight is gathered from all ranks once
  after each update, and else from its group; a frozen one always from its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import ELEMENT_BYTES, Deployment, Zero
from bico_ds.planner.ranges import Range
from bico_ds.planner.zero.gathering import Held, gathered
from bico_ds.planner.zero.modules import modules_of, parameters_of

# Assumptions. Of a link's data-sheet bandwidth, what large collectives reach (measure yours: nccl-tests, or the pre-flight);
# the delay of each rank in a ring; bytes per second of a node's NVMe drives together.
LINK_EFFICIENCY = Range(0.5, 0.9)
HOP_SECONDS = Range(2e-6, 10e-6)
NVME_BANDWIDTH = Range(3e9, 25e9)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of transfer in an optimizer step: bytes that a rank sends, and seconds by the links it crosses.

    `reduces`: whether it is the reduction of gradients, which runs beside the backward pass with `overlap_comm` alone.
    NCCL's own stream carries the gathering of weights either way.
    """

    name: str
    bytes: float
    seconds: Range
    how: str = ""
    reduces: bool = False


def transfers(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Transfer, ...]:
    """All transfers of one optimizer step of a rank, those between ranks first; none where there is nothing to send."""
    training = recipe.training
    accumulation = micro_batches_per_rank(
        training.global_batch_bins, training.micro_batch_bins, deployment.ranks
    )
    weight_bytes = ELEMENT_BYTES[recipe.model.dtype]
    between = _of_stage_3 if deployment.zero.stage == 3 else _of_stage_2
    found = [
        *between(recipe.model, architecture, deployment, accumulation, weight_bytes),
        *_of_offload(recipe.model, architecture, deployment, accumulation, weight_bytes),
    ]
    return tuple(transfer for transfer in found if transfer.bytes)


def _of_stage_2(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    zero, trained = deployment.zero, architecture.trained_parameters(model.lora)
    rounds = accumulation if zero.stage == 2 else 1
    return [
        _ring(
            deployment,
            "gradients, all-reduced",
            2 * rounds * trained * zero.communication_bytes,
            calls=rounds * trained / zero.reduce_bucket,
            how=f"{rounds} times all trained elements, there and back (DeepSpeed's stage_1_and_2.py)",
            reduces=True,
        ),
        _ring(
            deployment,
            "updated weights, gathered",
            trained * weight_bytes,
            calls=1,
            how="once after the step (ZeRO paper, section 7)",
        ),
    ]


def _of_stage_3(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    zero = deployment.zero
    replayed = _replayed(architecture, model, zero, deployment.ranks)
    per_micro_batch = sum(held.fetched for held in replayed)
    weights = parameters_of(modules_of(architecture, model.lora))
    small = sum(w.elements for w in weights if w.elements <= zero.persistence_threshold)
    trained = sum(w.elements for w in weights if w.trained)
    fetched = accumulation * per_micro_batch
    from_group = 0
    if zero.secondary_ranks is not None:
        updated = sum(w.elements for w in weights if w.trained and w.elements > zero.persistence_threshold)
        from_group = fetched - updated
    calls = sum(held.collectives for held in replayed) / max(1, per_micro_batch)
    how = f"{accumulation} times {per_micro_batch / 1e9:.3g} G elements (DeepSpeed's partitioned_param_coordinator.py)"
    return [
        _ring(
            deployment,
            "weights, gathered",
            (fetched - from_group) * weight_bytes,
            calls=calls * (fetched - from_group),
            how=how,
        ),
        _ring(
            deployment,
            "weights, gathered from the hpZ group",
            from_group * weight_bytes,
            calls=calls * from_group,
            group=zero.secondary_ranks,
            how=how,
        ),
        _ring(
            deployment, "small weights, gathered after the step", small * weight_bytes, calls=1, how="once"
        ),
        _ring(
            deployment,
            "gradients, reduce-scattered",
            accumulation * trained * zero.communication_bytes,
            calls=accumulation * trained / zero.reduce_bucket,
            how=f"{accumulation} times all trained elements (ZeRO paper, section 7)",
            reduces=True,
        ),
    ]


def _ring(
    deployment: Deployment,
    name: str,
    payload: float,
    *,
    calls: float,
    group: int | None = None,
    how: str,
    reduces: bool = False,
) -> Transfer:
    """A collective of `payload` bytes over the ring of all ranks, or of a `group` of neighbours.

    A rank sends (n - 1) / n of the payload (Patarasuk and Yuan, 2009; an all-reduce has twice the payload). NCCL builds a
    ring per network adapter, so that a node's ranks share what crosses its border; the slower kind of link decides.
    """
    ranks = deployment.ranks if group is None else group
    device, sent = deployment.device, payload * (ranks - 1) / ranks
    within = min(ranks, deployment.ranks_per_node)
    best = sent / device.link_bandwidth if within > 1 else 0.0
    if ranks > within:
        best = max(best, sent / within / device.network_bandwidth)
    hops = calls * (ranks - 1)
    seconds = Range(
        best / LINK_EFFICIENCY.high + hops * HOP_SECONDS.low,
        best / LINK_EFFICIENCY.low + hops * HOP_SECONDS.high,
    )
    return Transfer(name=name, bytes=sent, seconds=seconds, how=how, reduces=reduces)


def gather_all_weights(model: ModelSpec, architecture: Architecture, deployment: Deployment) -> Transfer:
    """All weights, gathered once from all ranks, module by module: what a partitioned model does for each new token."""
    size = architecture.parameters * ELEMENT_BYTES[model.dtype]
    calls = len(parameters_of(modules_of(architecture, model.lora)))
    return _ring(deployment, "all weights, gathered", size, calls=calls, how="once")


def _of_offload(
    model: ModelSpec, architecture: Architecture, deployment: Deployment, accumulation: int, weight_bytes: int
) -> list[Transfer]:
    """Copies between a device and its host, and between host and NVMe drives, which a node's ranks share."""
    zero, device = deployment.zero, deployment.device
    trained = architecture.trained_parameters(model.lora) / deployment.ranks
    found = []
    if zero.offload_optimizer != "none":
        found += [
            _over_host_link(
                device.host_bandwidth,
                "gradients, between device and host",
                2 * accumulation * trained * zero.gradient_bytes,
                "accumulated on the device, kept on the host (DeepSpeed's stage3.py, partition_grads)",
            ),
            _over_host_link(
                device.host_bandwidth,
                "updated weights, from the host",
                trained * weight_bytes,
                "once after the step",
            ),
        ]
    if zero.offload_optimizer == "nvme":
        size = 32 * trained
        per_rank = NVME_BANDWIDTH.times(1 / deployment.ranks_per_node)
        how = "read: gradient, master weight, moments (16 bytes); written: the same (ZeRO-Infinity, arXiv 2104.07857)"
        seconds = Range(size / per_rank.high, size / per_rank.low)
        found.append(
            Transfer(name="optimizer, from and to NVMe drives", bytes=size, seconds=seconds, how=how)
        )
    if zero.offload_parameters != "none":
        part = gathered_elements(architecture, model, zero, deployment.ranks) / deployment.ranks
        how = "a rank's part, before each gathering"
        found.append(
            _over_host_link(
                device.host_bandwidth,
                "partitioned weights, from the host",
                accumulation * part * weight_bytes,
                how,
            )
        )
    return found


def _over_host_link(bandwidth: float, name: str, size: float, how: str) -> Transfer:
    best = size / bandwidth
    seconds = Range(best / LINK_EFFICIENCY.high, best / LINK_EFFICIENCY.low)
    return Transfer(name=name, bytes=size, seconds=seconds, how=how)


def gathered_elements(architecture: Architecture, model: ModelSpec, zero: Zero, ranks: int) -> int:
    """Elements that ZeRO-3 gathers in one micro-batch, forward and backward, once the order of modules is known.

    Measured with small models on two ranks: exact where the limits are 1.17 or 4.6 times a layer, as DeepSpeed's are for 70B
    and 8B parameters; with adapters up to 6 % more is sent, and where the limit is one layer 1 to 5 % more.
    """
    return sum(held.fetched for held in _replayed(architecture, model, zero, ranks))


def _replayed(architecture: Architecture, model: ModelSpec, zero: Zero, ranks: int) -> tuple[Held, ...]:
    return gathered(modules_of(architecture, model.lora), model.activation_checkpointing, zero, ranks)
