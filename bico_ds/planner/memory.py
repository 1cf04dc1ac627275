"""Memory of one rank's device, item by item, at the moments that can be its peak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.planner.activations import ActivationMemory, activation_memory
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import ELEMENT_BYTES, Deployment
from bico_ds.planner.devices import Device
from bico_ds.planner.items import Item, total
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch
from bico_ds.planner.zero.gathering import Held, gathered, visits
from bico_ds.planner.zero.modules import Module, modules_of, parameters_of
from bico_ds.planner.zero.reduction import Bucket, Gradients
from bico_ds.planner.zero.states import States

# Bytes beside the caching allocator, as reported upstream: pytorch#107667 (300 MB, over 1,000 MB with all kernels loaded);
# per group of ranks nccl#964 (544 and 688 MB on 4 A100) and nccl#864 (1.6 GB, the context perhaps among it).
CUDA_CONTEXT = Range(0.3e9, 1.0e9)
NCCL_GROUP = Range(0.0, 1.6e9)
# Torch takes a workspace for each cuBLAS handle from its caching allocator (CublasHandlePool.cpp, parseChosenWorkspaceSize),
# and each thread has a handle: that of forward, and autograd's. 32 MiB on compute capability 9, 10 and 12, else :4096:2:16:8
# in KiB; by ROCm up to 128 MiB, with 76 for hipBLASLt. On an H200 a step held 0.067 GB more than its tensors.
CUBLAS_HANDLES = 2
_CUBLAS_WORKSPACE, _CUBLAS_WORKSPACE_FROM_9 = (4096 * 2 + 16 * 8) * 2**10, 4096 * 8 * 2**10
_CAPABILITY_FROM_9 = ("h100", "h200", "gh200", "b200", "gb200")  # how the names of such devices begin
_CAPABILITY_8 = ("a100", "l40", "l4", "a40", "rtx-4090", "rtx-3090")
_ROCM_WORKSPACES = Range(0.0, (128 + 76) * 2**20)
# Reserved and not allocated, by the caching allocator: the abstract of GMLake (arXiv 2401.08156) says that it reduces
# fragmentation by 15 % (up to 33 %) among eight LLMs on A100-80GB. That this is the caching allocator's own is our reading.
FRAGMENTATION = 0.15


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
        """Whether not even the lower bound of some moment does, which is what a plan says of it.

        A run is refused for less, since moments are replayed and some percent off: bico_ds/cluster/preflight/fit.py.
        """
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
        size=ELEMENT_BYTES[recipe.model.dtype],
        micro_batches=micro_batches_per_rank(
            recipe.training.global_batch_bins, recipe.training.micro_batch_bins, deployment.ranks
        ),
    )
    resident = tuple(item for item in (*states.resident(), *_context(deployment)) if item.bytes.high > 0)
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
    """Bytes at one module; of its layer's forward pass so much is `done`; `let_go`: of hpZ, as in `gathering.Held`."""

    module: Module
    gathered: float
    gradients: Gradients
    let_go: int
    done: float = 1.0


class _Replay:
    """A micro-batch, in the order in which DeepSpeed goes through the modules: gathered weights, and gradients."""

    def __init__(self, recipe: Recipe, modules: tuple[Module, ...], states: States) -> None:
        self.states = states
        self.modules = [module for module in modules if module.parameters]
        self.head = self.modules[-1]
        recompute_every = recipe.model.activation_checkpointing
        order = visits(modules, recompute_every)
        held: Sequence[Held] = [
            Held(visit=visit, most=0, running=0, fetched=0, let_go=0, collectives=0) for visit in order
        ]
        if states.zero.stage == 3:
            held = gathered(modules, recompute_every, states.zero, states.ranks, over_gloo=states.over_gloo)
        has_second = states.zero.secondary_ranks is not None
        held = [one if has_second else replace(one, let_go=0) for one in held if one.visit.module.parameters]
        forward, backward = held[: len(self.modules)], held[len(self.modules) :]
        self.at_head, self.at_end = forward[-1], backward[-1]

        largest = max(p.elements for m in self.modules if m.layer is not None for p in m.parameters)
        self.in_forward = [*states.of_forward(), *states.of_streams(largest, backward=False)]
        self.in_backward = {
            there: [*states.of_backward(partition=there), *states.of_streams(largest, backward=True)]
            for there in (False, True)
        }
        self.last_layer = max(module.layer or 0 for module in modules)
        self.forward = _unlike(reversed(list(self._forward_points(forward))))[::-1]
        self.backward = _unlike(self._backward(backward))

    def _forward_points(self, forward: Sequence[Held]) -> Iterator[_Point]:
        """The layer that runs is taken for as far as its modules are."""
        for layer, group in groupby(forward, key=lambda held: held.visit.module.layer):
            of_layer = list(group)
            for number, held in enumerate(of_layer, start=1):
                module = held.visit.module
                done = float(module is not self.modules[0]) if layer is None else number / len(of_layer)
                size = self.states.size * held.most
                yield _Point(
                    module=module, gathered=size, gradients=Gradients(whole=0), done=done, let_go=held.let_go
                )

    def _new(self, module: Module) -> int:
        return sum(self.states.size * p.elements for p in module.parameters if p.trained)

    def _backward(self, backward: Sequence[Held]) -> Iterator[_Point]:
        """Autograd adds up the gradients of a tied weight before it hands them over, which is at the embedding."""
        states = self.states
        bucket = Bucket(
            states.zero,
            states.ranks,
            states.size,
            states.parameters,
            over_gloo=states.over_gloo,
        )
        tied = self.head.parameters == self.modules[0].parameters
        kept, size = 0, 0.0
        for held in backward:
            module = held.visit.module
            new = self._new(module) if held.visit.during == "backward" else 0
            yield _Point(
                module=module,
                gathered=states.size * held.most,
                gradients=bucket.now(kept),
                let_go=held.let_go,
            )
            size = states.size * held.running
            yield _Point(module=module, gathered=size, gradients=bucket.now(kept + new), let_go=held.let_go)
            if module is self.head and tied:
                kept = new
            elif new:
                for parameter in module.parameters:
                    yield _Point(
                        module=module, gathered=size, gradients=bucket.add(parameter), let_go=held.let_go
                    )
        yield _Point(
            module=self.modules[0],
            gathered=size,
            gradients=bucket.flush(bucket.now()),
            let_go=self.at_end.let_go,
        )

    def moments(self, rows: ActivationMemory) -> Iterator[tuple[str, list[Item]]]:
        """Each moment's items beside the resident ones: of all points that are called alike, the one with the most."""
        found: dict[str, list[Item]] = {}
        for name, items in (*self._forward(rows), *(self._at(point, rows) for point in self.backward)):
            if name not in found or total(items).high > total(found[name]).high:
                found[name] = items
        found["optimizer"] = [
            *self.states.of_step(),
            *self.states.second_partition(self.at_end.let_go),
        ]
        for name, items in found.items():
            yield name, [item for item in items if item.bytes.high > 0]

    def _forward(self, rows: ActivationMemory) -> Iterator[tuple[str, list[Item]]]:
        head = _item(
            "gradient of the head", self._new(self.head), "in the model's dtype: bico_ds/model/head.py"
        )
        for point in self.forward:
            weights = [
                *self.in_forward,
                *self.states.second_partition(point.let_go),
                _gathered(point.gathered),
            ]
            kept = self._kept(rows, point.module)
            yield "forward pass", [*weights, *kept, *_share(rows.in_head[:1], point.done)]
            if point.module.layer is not None:
                yield "forward pass", [*weights, *kept, *rows.passing]
        gathered_then = _gathered(self.states.size * self.at_head.running)
        weights = [*self.in_forward, *self.states.second_partition(self.at_head.let_go), gathered_then]
        yield "head", [*weights, head, *rows.kept, *rows.in_head]

    def _kept(self, rows: ActivationMemory, module: Module) -> list[Item]:
        """What is kept of the rows where a module runs: in proportion to the layers before it."""
        share = 0.0 if module is self.modules[0] else 1.0
        if module.layer is not None and self.last_layer > 0:
            share = module.layer / self.last_layer
        return _share(rows.kept, share)

    def _at(self, point: _Point, rows: ActivationMemory) -> tuple[str, list[Item]]:
        """The moment that a point of the backward pass belongs to, and its items."""
        weights = [
            *self.in_backward[point.gradients.partition],
            *self.states.second_partition(point.let_go),
            _gathered(point.gathered),
            _item("whole gradients", point.gradients.whole, "until they are in a bucket, or reduced"),
            _item("copies for the reduction", point.gradients.copies, "in the type of communication"),
        ]
        if point.module.layer is not None:
            return "backward of a layer", [*weights, *self._kept(rows, point.module), *rows.in_layer]
        if point.module is self.modules[0]:
            return "end of the backward pass", weights
        return "gradient of the head", [*weights, *rows.kept, *rows.in_head[:1]]


def _unlike(points: Iterable[_Point]) -> list[_Point]:
    """Of points that differ by their layer alone the first: they come from the last layer on, where most rows are kept."""
    found: dict[object, _Point] = {}
    for point in points:
        kind = point.module.name if point.module.layer is None else "layer"
        found.setdefault((kind, point.gathered, point.gradients, point.done, point.let_go), point)
    return list(found.values())


def _context(deployment: Deployment) -> Iterator[Item]:
    """What is on a GPU beside the run's own tensors."""
    if deployment.device.kind == "cuda":
        yield Item(
            name="cuBLAS workspaces",
            bytes=_cublas_workspace(deployment.device).times(CUBLAS_HANDLES),
            how=f"CublasHandlePool.cpp: {CUBLAS_HANDLES} handles, of forward and of autograd's thread",
        )
        yield Item(
            name="CUDA context",
            bytes=CUDA_CONTEXT,
            how="pytorch#107667: with and without lazy loading",
            is_tensor=False,
        )
        if deployment.ranks > 1:
            groups = 1 if deployment.zero.secondary_ranks is None else 2
            yield Item(
                name="NCCL",
                bytes=NCCL_GROUP.times(groups),
                how=f"nccl#964, nccl#864: {groups} groups",
                is_tensor=False,
            )


def _cublas_workspace(device: Device) -> Range:
    """Of one handle; of a device that the table does not have, within the bounds of NVIDIA's."""
    if device.name.startswith("mi300x"):
        return _ROCM_WORKSPACES
    if device.name.startswith(_CAPABILITY_FROM_9):
        return Range.exactly(_CUBLAS_WORKSPACE_FROM_9)
    if device.name.startswith(_CAPABILITY_8):
        return Range.exactly(_CUBLAS_WORKSPACE)
    return Range(_CUBLAS_WORKSPACE, _CUBLAS_WORKSPACE_FROM_9)


def _with_margin(items: tuple[Item, ...], deployment: Deployment) -> tuple[Item, ...]:
    if deployment.device.kind != "cuda":
        return items
    margin = FRAGMENTATION / (1 - FRAGMENTATION) * total(items).high
    how = f"{FRAGMENTATION:.0%} of what is reserved: the mean of GMLake (arXiv 2401.08156)"
    return (
        *items,
        Item(name="allocator's margin", bytes=Range(0.0, margin), how=how, is_tensor=False),
    )


def _share(items: Sequence[Item], share: float) -> list[Item]:
    return [replace(item, bytes=item.bytes.times(share)) for item in items]


def _gathered(size: float) -> Item:
    return _item("gathered weights", size, "partitioned_param_coordinator.py, replayed")


def _item(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)
