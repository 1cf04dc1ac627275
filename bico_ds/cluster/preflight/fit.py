"""Whether a run can fit into the memory of its nodes at all, by the least that its plan needs. Pure functions, no torch.

A plan may be wrong on the high side, so a run is refused for two things alone: the states that stay between steps, and the
activations that a forward pass keeps for the backward pass, of bins as full as they are at least. What is no tensor
(processes, which share pages; CUDA's context) is an assumption, and refuses nothing. Swap counts as memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bico_ds.planner.activations import activation_memory
from bico_ds.planner.decisions import suggest
from bico_ds.planner.deployment import spread
from bico_ds.planner.devices import DEVICES, Device, cpu_device
from bico_ds.planner.items import Item, total
from bico_ds.planner.plan import Plan
from bico_ds.planner.workload import MicroBatch

_GB = 1e9
_SEARCHED_LAYERS = 500


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Of the node `host`, in bytes: of its smallest GPU (None: its ranks compute on CPUs), and of the host with its swap."""

    host: str
    ranks: int
    device_bytes: int | None
    host_bytes: int

    def device(self) -> Device:
        """What its ranks compute on, as far as memory goes: the rates are no one's."""
        if self.device_bytes is None:
            return cpu_device(self.host_bytes, 1e12, self.ranks)
        return replace(DEVICES["h100-80g"], name="the GPU", memory_bytes=self.device_bytes)


def by_node(ranks: Iterable[tuple[str, str, int | None, int]]) -> list[NodeMemory]:
    """The nodes of all ranks: of each its host, its machine, the bytes of its GPU (None: on a CPU), and those of its host.

    Two machines may have one host name (`localhost`), so the machine tells nodes apart.
    """
    found: dict[tuple[str, str], list[tuple[int | None, int]]] = defaultdict(list)
    for host, machine, of_device, of_host in ranks:
        found[host, machine].append((of_device, of_host))
    return [
        NodeMemory(
            host=host,
            ranks=len(of_ranks),
            device_bytes=min((of_device for of_device, _ in of_ranks if of_device is not None), default=None),
            host_bytes=max(of_host for _, of_host in of_ranks),
        )
        for (host, _), of_ranks in found.items()
    ]


class PlanOn(Protocol):
    """Makes the plan of a run on these devices."""

    def __call__(self, device: Device, *, nodes: int, ranks_per_node: int) -> Plan: ...


def lack_of_memory(
    plan_on: PlanOn, nodes: Sequence[NodeMemory], *, fill: float, world_size: int | None = None
) -> str | None:
    """Which memory cannot hold the run, what takes most of it, and what would fit; None where it may fit.

    `world_size`: ranks of the run, where `nodes` are not all of its nodes.

    `fill`: the share of their bins' room that micro-batches take at least, 0 where that is not known. Whatever is wrong
    with a plan, it is no reason to refuse a run: whoever shows the plan says what.
    """
    smallest = min(nodes, key=lambda node: node.device().memory_bytes)
    count, per_node = spread(world_size or sum(node.ranks for node in nodes), smallest.ranks)
    try:
        plan = plan_on(smallest.device(), nodes=count, ranks_per_node=per_node)
    except Exception:
        return None
    on_device = [*(item for item in plan.memory.resident if item.is_tensor), *_kept(plan, fill)]
    on_host = [replace(item, bytes=item.bytes.times(1 / per_node)) for item in plan.host if item.is_tensor]
    found = (_lack_on(node, plan, on_device, on_host) for node in nodes)
    return next((lack for lack in found if lack is not None), None)


def _lack_on(node: NodeMemory, plan: Plan, on_device: Sequence[Item], on_host: Sequence[Item]) -> str | None:
    """Of one node; the items are those of one rank."""
    if node.device_bytes is None:
        on_host = [*on_host, *on_device]
    elif total(on_device).low > node.device_bytes:
        return _message(f"{node.host}: a GPU", 1, on_device, node.device_bytes, _advice(plan))
    if node.ranks * total(on_host).low <= node.host_bytes:
        return None
    advice = _advice(plan)
    if node.device_bytes is not None:
        advice = "more nodes, or the optimizer on NVMe, would need less"
    return _message(f"{node.host}: the host, swap included,", node.ranks, on_host, node.host_bytes, advice)


def _advice(plan: Plan) -> str | None:
    """A search makes tens of plans, each in proportion to the layers: of thousands it would take minutes."""
    return suggest(plan) if plan.architecture.layers <= _SEARCHED_LAYERS else None


def _kept(plan: Plan, fill: float) -> list[Item]:
    """Activations of the objective that keeps least: a short run may draw no other."""

    def kept(batch: MicroBatch) -> tuple[Item, ...]:
        on_cuda = plan.deployment.device.kind == "cuda"
        return activation_memory(plan.architecture, plan.recipe.model, batch, on_cuda=on_cuda).kept

    least = min(map(kept, plan.batches), key=lambda items: total(items).low)
    return [replace(item, bytes=item.bytes.times(fill)) for item in least]


def _message(where: str, ranks: int, items: Sequence[Item], there: float, advice: str | None) -> str:
    least, largest = ranks * total(items).low, max(items, key=lambda item: item.bytes.low)
    of_ranks = f" for {ranks} ranks" if ranks > 1 else ""
    return (
        f"{where} has {there / _GB:,.1f} GB of memory, and this run needs at least {least / _GB:,.1f} GB{of_ranks}, most of "
        f"it for {largest.name}; {advice or 'bico-ds plan shows what it takes, and other ways to run it'}"
    )
