"""Memory of one rank's device, item by item, at the moments that can be its peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.planner.activations import ActivationMemory, activation_memory
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Deployment
from bico_ds.planner.items import Item, total
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch
from bico_ds.planner.zero.gathering import Visit, gathered, visits
from bico_ds.planner.zero.modules import Module, modules_of, parameters_of
from bico_ds.planner.zero.reduction import Bucket, Gradients
from bico_ds.planner.zero.states import States


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
    """One rank's device, item by item: DeepSpeed's states (`zero.states`), gathered weights (`zero.gathering`), gradients
    (`zero.reduction`) and activations (`activations`).

    Moments of each objective: the head at the end of the forward pass, the reduction of the head's gradient, the backward
    pass of the layer that needs most, its end, and the optimizer's step.
    """
    lora = recipe.model.lora
    modules = modules_of(architecture, lora)
    states = States(
        parameters=parameters_of(modules),
        optimizer=recipe.optimizer.state,
        deployment=deployment,
        size=2 if recipe.model.dtype == "bf16" else 4,
        micro_batches=micro_batches_per_rank(
            recipe.training.global_batch_bins, recipe.training.micro_batch_bins, deployment.ranks
        ),
    )
    resident = (*states.resident(), *_context(deployment))
    replay = _Replay(recipe, modules, states)
    moments = []
    for batch in batches:
        rows = activation_memory(
            architecture,
            recipe.model,
            batch,
            on_cuda=deployment.device.kind == "cuda",
            zero3=deployment.zero.stage == 3,
        )
        moments += [
            Moment(name=name, objective=batch.objective, items=_with_margin((*resident, *items), deployment))
            for name, items in replay.moments(rows)
        ]
    return MemoryPlan(resident=resident, moments=tuple(moments), available=deployment.device.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Bytes while one module runs backward, or is run again for it."""

    module: Module
    gathered: float
    gradients: Gradients


class _Replay:
    """A micro-batch, in the order in which DeepSpeed goes through the modules: gathered weights, and gradients."""

    def __init__(self, recipe: Recipe, modules: Sequence[Module], states: States) -> None:
        self.states, self.modules, self.head = states, modules, modules[-1]
        order = list(visits(modules, recipe.model.activation_checkpointing))
        held = [0] * len(order)
        if states.zero.stage == 3:
            held = [point.elements for point in gathered(order, states.zero, states.ranks)]
        sizes = [states.size * elements for elements in held]
        self.in_head = sizes[len(modules) - 1]
        self.backward = list(self._backward(order[len(modules) :], sizes[len(modules) :]))

    @property
    def head_gradient(self) -> int:
        """Made in the forward pass (`bico_ds.model.head`), in the model's dtype."""
        return self._new(self.head)

    def _new(self, module: Module) -> int:
        return sum(self.states.size * p.elements for p in module.parameters if p.trained)

    def _backward(self, order: Sequence[Visit], sizes: Sequence[float]) -> Iterator[_Point]:
        """Autograd adds up the gradients of a tied weight before it hands them over, which is at the embedding."""
        bucket = Bucket(self.states.zero, self.states.ranks, self.states.size, self.states.parameters)
        tied = self.head.parameters == self.modules[0].parameters
        kept = 0
        for visit, size in zip(order, sizes, strict=True):
            whole = bucket.whole + kept
            if visit.during == "recomputed":
                yield _Point(module=visit.module, gathered=size, gradients=Gradients(whole=whole, copies=0))
                continue
            new = self._new(visit.module)
            yield _Point(module=visit.module, gathered=size, gradients=Gradients(whole=whole + new, copies=0))
            if visit.module is self.head and tied:
                kept = new
                continue
            kept = 0 if visit.module is self.modules[0] else kept
            for parameter in visit.module.parameters:
                if parameter.trained:
                    step = bucket.add(parameter)
                    yield _Point(module=visit.module, gathered=size, gradients=step)
        last = Gradients(whole=bucket.whole, copies=bucket.flush())
        yield _Point(module=self.modules[0], gathered=sizes[-1], gradients=last)

    def moments(self, rows: ActivationMemory) -> Iterator[tuple[str, list[Item]]]:
        """Each moment's items beside the resident ones."""
        head = _item(
            "gradient of the head", self.head_gradient, "made in the forward pass: bico_ds/model/head.py"
        )
        weights = _item("gathered weights", self.in_head, "partitioned_param_coordinator.py, replayed")
        yield "head", [*self.states.of_forward(), weights, head, *rows.kept, *rows.in_head]
        found: dict[str, list[Item]] = {}
        for point in self.backward:
            name, items = self._at(point, rows)
            if name not in found or total(items).high > total(found[name]).high:
                found[name] = items
        yield from found.items()
        yield "optimizer", list(self.states.of_step())

    def _at(self, point: _Point, rows: ActivationMemory) -> tuple[str, list[Item]]:
        """The moment that a point belongs to, and its items. What is kept of the rows becomes less layer by layer."""
        layer, last = point.module.layer, max(module.layer or 0 for module in self.modules)
        weights = [
            *self.states.of_backward(),
            _item("gathered weights", point.gathered, "partitioned_param_coordinator.py, replayed"),
            _item("whole gradients", point.gradients.whole, "until they are in a bucket, or reduced"),
            _item("copies for the reduction", point.gradients.copies, "in the type of communication"),
        ]
        if layer is not None:
            share = layer / last if last else 1.0
            kept = [replace(item, bytes=item.bytes.times(share)) for item in rows.kept]
            return "backward of a layer", [*weights, *kept, *rows.in_layer]
        if point.module is self.modules[0]:
            return "end of the backward pass", weights
        return "gradient of the head", [*weights, *rows.kept, *rows.in_head[:1]]


def _context(deployment: Deployment) -> tuple[Item, ...]:
    return ()


def _with_margin(items: tuple[Item, ...], deployment: Deployment) -> tuple[Item, ...]:
    return items


def _item(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)
