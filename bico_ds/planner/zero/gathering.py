"""Which parameters ZeRO-3 holds gathered at each point of a step: DeepSpeed's `PartitionedParameterCoordinator`, replayed.

Source of every rule: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (`fetch_sub_module`,
`release_sub_module`, `__params_to_release`) with a complete trace, as it is from a run's third micro-batch on, and
partition_parameters.py (`all_gather_coalesced`, `AllGatherCoalescedHandle.wait`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Literal

from bico_ds.planner.deployment import Zero
from bico_ds.planner.zero.modules import Module, Parameter, in_backward

Pass = Literal["forward", "recomputed", "announced", "backward"]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One module in one pass: its weights are gathered before it (`fetches`) and let go after it (`releases`).

    `announced`: by the gradient of one of its outputs, while another's is still to come. `drops`: let go after it, even if
    they are used soon.
    """

    module: Module
    during: Pass
    fetches: bool = True
    releases: bool = True
    drops: tuple[Parameter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Held:
    """Elements in memory at a module, beside partitions and persistent parameters: the most, and while it runs.

    `fetched`: gathered for it or, ahead of time, for later ones: what the ranks send each other, in so many `collectives`.
    `let_go`: of trained parameters that were let go before it, once or more, in this micro-batch: hpZ has a second partition
    of each.
    """

    visit: Visit
    most: int
    running: int
    fetched: int
    let_go: int
    collectives: int


@lru_cache(maxsize=64)
def visits(modules: tuple[Module, ...], recompute_every: int) -> tuple[Visit, ...]:
    """A micro-batch's modules, forward and backward: DeepSpeed comes by at those without parameters, too, and prefetches.

    A layer is recomputed when the backward pass of its last module needs what was not kept, and only as far as to that
    module (torch.utils.checkpoint stops early); the norm that ran before it runs inside it then. Frozen weights that it
    gathers belong to that module, and go with it (`update_recompute_parameters`); the layer's other modules gather them
    again.
    """
    forward = (Visit(module=module, during="forward") for module in modules)
    return (*forward, *_backward_visits(modules, recompute_every))


def _backward_visits(modules: Sequence[Module], recompute_every: int) -> Iterator[Visit]:
    forward = {layer: list(group) for layer, group in groupby(modules, key=lambda module: module.layer)}
    for layer, group in groupby(in_backward(modules), key=lambda module: module.layer):
        backward = [module for module in group if module.has_backward]
        if layer is None or not recompute_every or layer % recompute_every:
            yield from _backward(*backward)
            continue
        before = next(index for index, module in enumerate(backward) if module.parameters)
        yield from _backward(*backward[:before])
        last = backward[before]
        yield Visit(module=last, during="recomputed", releases=False)
        outermost = max(module.encloses for module in forward[layer])
        for module in sorted(forward[layer], key=lambda module: module.encloses != outermost):
            yield Visit(module=module, during="recomputed", releases=module is not last)
        frozen = tuple(p for module in forward[layer] for p in module.parameters if not p.trained)
        yield Visit(module=last, during="backward", fetches=False, releases=last.passes_on, drops=frozen)
        yield from _backward(*backward[before + 1 :])


def _backward(*modules: Module) -> Iterator[Visit]:
    for module in modules:
        for _ in range(module.outputs - 1):
            yield Visit(module=module, during="announced", releases=False)
        yield Visit(module=module, during="backward", releases=module.passes_on)


@lru_cache(maxsize=64)
def gathered(
    modules: tuple[Module, ...], recompute_every: int, zero: Zero, ranks: int, *, over_gloo: bool = False
) -> tuple[Held, ...]:
    """What is held at each of the `visits`. On one rank nothing is: its partition is the whole.

    `over_gloo`: a gather receives into a tensor of gloo's own first (torch's ProcessGroupGloo, `newLikeFlat`), as on CPUs.

    Cached, since memory, communication and plans of other micro-batches ask for the same.
    """
    return tuple(_replayed(visits(modules, recompute_every), zero, ranks, over_gloo=over_gloo))


def _replayed(order: Sequence[Visit], zero: Zero, ranks: int, *, over_gloo: bool) -> Iterator[Held]:
    steps = [visit.module for visit in order if visit.fetches]
    coordinator = _Coordinator(zero, ranks, steps, over_gloo=over_gloo)
    for visit in order:
        before = coordinator.collectives
        fetched = coordinator.fetch(visit.module) if visit.fetches else 0
        most, running = (coordinator.peak, coordinator.held) if ranks > 1 else (0, 0)
        yield Held(
            visit=visit,
            most=most,
            running=running,
            fetched=fetched,
            let_go=coordinator.elements_let_go,
            collectives=coordinator.collectives - before,
        )
        if visit.releases:
            coordinator.release(visit.module)
        for parameter in visit.drops:
            coordinator.drop(parameter)
        coordinator.peak = coordinator.held


@dataclass(kw_only=True, eq=False)
class _Group:
    """Parameters that are gathered together, into one flat tensor that is there until the last of them was waited for."""

    parameters: Sequence[Parameter]
    elements: int
    copied: bool = False


class _Coordinator:
    """DeepSpeed's, in elements. `live`: its own count; `held`: flat tensors, too; `peak`: of `held`, since it was set."""

    def __init__(self, zero: Zero, ranks: int, steps: Sequence[Module], *, over_gloo: bool) -> None:
        self.zero, self.ranks, self.steps, self.step, self.over_gloo = zero, ranks, steps, 0, over_gloo
        self.before = [0, *accumulate(sum(p.elements for p in module.parameters) for module in steps)]
        self.uses: dict[Parameter, list[int]] = {}
        for index, module in enumerate(steps):
            for parameter in module.parameters:
                self.uses.setdefault(parameter, []).append(index)
        self.queue = deque((p, index) for index, module in enumerate(steps) for p in module.parameters)
        self.fetched_for: dict[Parameter, int] = {}
        self.available: dict[Parameter, int] = {}
        self.groups: dict[Parameter, _Group] = {}
        self.live, self.held, self.peak, self.collectives = 0, 0, 0, 0
        self.let_go: set[Parameter] = set()
        self.elements_let_go = 0

    def fetch(self, module: Module) -> int:
        """Gather a module's parameters, wait for them, and gather some of the next ones; return the elements gathered."""
        fetched = self._gather([p for p in module.parameters if self._is_missing(p)])
        for parameter in module.parameters:
            self._wait(parameter)
        unseen = {p for p in module.parameters if self.fetched_for.get(p, -1) < self.step}
        for _ in range(len(unseen)):
            self._next_in_queue()
        fetched += self._gather(self._ahead())
        self.step += 1
        return fetched

    def release(self, module: Module) -> None:
        """Let go of a module's parameters, but not of those that are used again soon, or that prefetching has passed by."""
        for parameter in module.parameters:
            passed_by = self.fetched_for.get(parameter, -1) > self.step
            if not passed_by and not self._is_used_soon(parameter):
                self.drop(parameter)

    def drop(self, parameter: Parameter) -> None:
        """Let go of one parameter, if it is there."""
        if parameter in self.available:
            self.held -= self.available.pop(parameter)
            self.live -= parameter.elements
            if parameter.trained and parameter not in self.let_go:
                self.let_go.add(parameter)
                self.elements_let_go += parameter.share(self.ranks) * self.ranks

    def _is_persistent(self, parameter: Parameter) -> bool:
        return parameter.elements <= self.zero.persistence_threshold

    def _is_missing(self, parameter: Parameter) -> bool:
        known = parameter in self.available or parameter in self.groups
        return not known and not self._is_persistent(parameter)

    def _is_used_soon(self, parameter: Parameter) -> bool:
        uses = self.uses[parameter]
        index = bisect_left(uses, self.step)
        if index == len(uses):
            return False
        return self.before[uses[index]] - self.before[self.step] < self.zero.max_reuse_distance

    def _next_in_queue(self) -> Parameter:
        parameter, step = self.queue.popleft()
        self.fetched_for[parameter] = max(step, self.fetched_for.get(parameter, -1))
        return parameter

    def _ahead(self) -> list[Parameter]:
        """The next missing parameters, until they are a bucket: the last one may be larger than all of it."""
        most = min(self.zero.max_live_parameters - self.live, self.zero.prefetch_bucket)
        found: dict[Parameter, int] = {}
        while self.queue and sum(found.values()) < most:
            parameter = self._next_in_queue()
            if self._is_missing(parameter):
                found[parameter] = parameter.elements
        return list(found)

    def _gather(self, parameters: Sequence[Parameter]) -> int:
        if not parameters:
            return 0
        self.collectives += 1
        padded = sum(p.share(self.ranks) for p in parameters) * self.ranks
        group = _Group(parameters=parameters, elements=padded)
        self.groups |= dict.fromkeys(parameters, group)
        self.held += padded
        self.live += sum(p.elements for p in parameters)
        self.peak = max(self.peak, self.held + (padded if self.over_gloo else 0))
        return padded

    def _wait(self, parameter: Parameter) -> None:
        """Of several in one flat tensor each gets a copy, all of them as soon as one is waited for."""
        group = self.groups.pop(parameter, None)
        if group is None:
            return
        if len(group.parameters) == 1:
            self.available[parameter] = group.elements
            return
        if not group.copied:
            self.available |= {p: p.elements for p in group.parameters}
            self.held += sum(p.elements for p in group.parameters)
            self.peak, group.copied = max(self.peak, self.held), True
        if group not in self.groups.values():
            self.held -= group.elements
