"""Memory of a training step: what the GPU's caching allocator counted, beside what the planner says of the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from step_shapes import Bench

from bico_ds.batch import PackedBatch
from bico_ds.model.weights.materialize import full_numel
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import Device
from bico_ds.planner.items import Item, of_tensors
from bico_ds.planner.memory import MemoryPlan, device_memory
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch

GB = 1e9
PHASES = ("forward", "backward", "update")
# The phase of a step to which each moment of a plan belongs.
PHASE_OF = {
    "forward pass": "forward",
    "head": "forward",
    "gradient of the head": "backward",
    "backward of a layer": "backward",
    "end of the backward pass": "backward",
    "optimizer": "update",
}
# The lines of the table of what is there between steps, by a word in the names of the plan's items.
WORDS = {"fp32 masters": "master", "moments": "moments", "parameters": "weights"}
REST = "gradients, buckets and the rest"


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """A step's memory in bytes, by the caching allocator's own count.

    `rest`: allocated between steps. `kept`: by the forward pass for the backward pass, beside it. `peaks`: the most that
    was allocated in each of `PHASES`. `reserved`: what the allocator held of the device.
    """

    rest: int
    kept: int
    peaks: dict[str, int]
    reserved: int


def measure_memory(bench: Bench, batch: PackedBatch) -> StepMemory:
    """One step, phase by phase."""
    rest = torch.cuda.memory_allocated()
    peaks: dict[str, int] = {}

    def end_phase(name: str) -> None:
        peaks[name] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    loss = bench.forward(batch)
    kept = torch.cuda.memory_allocated() - rest
    end_phase("forward")
    bench.backward(loss, len(batch.targets))
    end_phase("backward")
    bench.update()
    end_phase("update")
    return StepMemory(rest=rest, kept=kept, peaks=peaks, reserved=torch.cuda.memory_reserved())


def plan_memory(bench: Bench, device: Device, backend: str, kind: str, batch: PackedBatch) -> MemoryPlan:
    """What the planner says of this rank on `device`, with the batch's own counts in the place of expected ones."""
    model = bench.recipe.model.model_copy(update={"attention_backend": backend})
    recipe = bench.recipe.model_copy(update={"model": model})
    architecture = read_architecture(model)
    zero = read_zero(
        recipe, hidden_size=architecture.hidden, ranks=1, ranks_per_node=1, on_cuda=bench.on_cuda
    )
    deployment = Deployment(device=device, nodes=1, ranks_per_node=1, zero=zero)
    return device_memory(recipe, architecture, deployment, [counted(kind, batch)])


def counted(kind: str, batch: PackedBatch) -> MicroBatch:
    """A real batch as the planner's average one."""
    return MicroBatch(
        objective=kind,
        probability=1.0,
        mode=batch.plan.mode,
        documents=batch.plan.num_documents,
        longest=int(batch.position_ids.max()) + 1,
        tokens=batch.represented_tokens,
        kept_rows=batch.plan.num_kept,
        live_rows=batch.plan.num_live,
        pairs=batch.plan.num_pairs,
        head_rows=len(batch.targets),
    )


def planned_phases(plan: MemoryPlan) -> dict[str, Range]:
    """The largest moment of each phase."""
    found: dict[str, Range] = {}
    for moment in plan.moments:
        phase = PHASE_OF[moment.name]
        size = of_tensors(moment.items)
        known = found.get(phase, size)
        found[phase] = Range(max(known.low, size.low), max(known.high, size.high))
    return found


def beside_plan(measured: StepMemory | None, plan: MemoryPlan) -> dict[str, dict[str, Any]]:
    """GB by phase, and between steps (`rest`): planned, from and to; measured, and its ratio to the middle of the plan."""
    seen = {} if measured is None else {"rest": measured.rest, **measured.peaks}
    return {
        phase: {
            "planned": [in_gb(size.low), in_gb(size.high)],
            "measured": in_gb(seen[phase]) if phase in seen else None,
            "ratio": _ratio(seen[phase], size) if phase in seen else None,
        }
        for phase, size in {"rest": of_tensors(plan.resident), **planned_phases(plan)}.items()
    }


def farthest(phases: dict[str, dict[str, Any]]) -> float:
    """How far the phase that is farthest from its plan is, in per cent of the plan."""
    return max(100 * abs(of["ratio"] - 1) for of in phases.values())


def phases_in_gb(bench: Bench, measured: StepMemory, targets: int) -> list[float]:
    """GB over what is there between steps, as the table of `StepBench.add_memory_tables` shows them."""
    peaks = [measured.peaks[phase] - measured.rest for phase in PHASES]
    spare = measured.reserved - max(measured.peaks.values())
    gradient, chunk = head_bytes(bench, targets)
    return list(map(in_gb, (measured.kept, gradient, peaks[0], chunk, *peaks[1:], spare)))


def in_gb(size: float) -> float:
    return round(size / GB, 3)


def head_bytes(bench: Bench, targets: int) -> tuple[int, int]:
    """Arithmetic: bytes of the head's weight gradient, which the forward pass keeps, and of a chunk's two logit buffers."""
    head = bench.engine.module.causal_lm.lm_head
    weight = head.weight
    gradient = full_numel(weight) * weight.element_size() if weight.requires_grad else 0
    rows = min(head.chunk_rows, targets)
    return gradient, rows * bench.config.vocab_size * (weight.element_size() + 4)


def memory_at_rest(bench: Bench, plan: MemoryPlan) -> list[list[Any]]:
    """[item, GB, planned GB, ratio, how it is known]; on a CPU without what only the GPU's allocator knows."""
    module, optimizer = bench.engine.module, bench.engine.optimizer.optimizer
    parameters = sum(full_numel(p) * p.element_size() for p in module.parameters())
    masters = sum(master.nbytes for master in optimizer.state)
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    measured: dict[str, tuple[int, str]] = {
        "parameters": (parameters, "by their number and dtype"),
        "fp32 masters": (masters, "the optimizer's tensors"),
        "moments": (moments, "the optimizer's tensors"),
    }
    if bench.on_cuda:
        allocated = torch.cuda.memory_allocated()
        rest = allocated - parameters - masters - moments
        measured |= {REST: (rest, "the difference"), "all": (allocated, "torch.cuda.memory_allocated")}
    planned = {name: of_tensors(item for item in plan.resident if _kind(item) == name) for name in measured}
    planned["all"] = of_tensors(plan.resident)
    return [
        [name, in_gb(size), in_gb(planned[name].middle), _ratio(size, planned[name]), how]
        for name, (size, how) in measured.items()
    ]


def _kind(item: Item) -> str:
    """Which line of the table an item of the plan belongs to."""
    return next((line for line, word in WORDS.items() if word in item.name), REST)


def _ratio(measured: float, planned: Range) -> float | None:
    return round(measured / planned.middle, 4) if planned.middle else None
