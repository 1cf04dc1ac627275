"""Memory of one rank's device, item by item, at the moments that can be its peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Deployment
from bico_ds.planner.items import Item, total
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is in memory at one point of a step of `objective`."""

    name: str
    objective: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> Range:
        return total(self.items)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One rank's device: what is there between steps, and every moment of a step; `available`: bytes of the device."""

    resident: tuple[Item, ...]
    moments: tuple[Moment, ...]
    available: float

    @property
    def peak(self) -> Moment:
        """The moment with the largest upper bound."""
        return max(self.moments, key=lambda moment: moment.bytes.high)

    @property
    def fits(self) -> bool:
        """Whether even the upper bound of the peak does."""
        return self.peak.bytes.high <= self.available

    @property
    def cannot_fit(self) -> bool:
        """Whether not even the lower bound of some moment does: what a run is refused for."""
        return max(moment.bytes.low for moment in self.moments) > self.available


def device_memory(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, batches: Sequence[MicroBatch]
) -> MemoryPlan:
    """STUB"""
    states = Item(
        name="states",
        bytes=Range.exactly(18 * architecture.trained_parameters(recipe.model.lora) / deployment.ranks),
    )
    moment = Moment(name="backward of a layer", objective=batches[0].objective, items=(states,))
    return MemoryPlan(resident=(states,), moments=(moment,), available=deployment.device.memory_bytes)
