"""A plan as one JSON object for programs.

A range is `{"low", "high"}`, an item `{"name", "bytes": range, "how"}`. Bytes, seconds, FLOPs and tokens have no
multiples; rates are per second and device. Keys are added in later versions, and none is renamed or removed.

    recipe, notes[]
    verdict             "fits", "may not fit" or "does not fit"
    sentence            the verdict as a sentence, with the change that would fit
    warnings[], assumptions[]
    change              null, or what would fit: {"words"[], "memory": range}
    largest_micro_batch bins that fit at once, as far as they are tried (4,096, and 2^31 tokens)
    deployment          device, title, nodes, ranks_per_node, ranks, deepspeed, zero_stage
    model               parameters, trained_parameters, source
    texts               source, mean_length, tokens (of a data epoch, or null)
    memory              available, resident[] and moments[]: {"name", "objective", "bytes", "items"[], "is_peak"}
    host[], nvme[], disk[]   items; the first two of a node
    steps[]             per objective: objective, probability, micro_batch {rows, live_rows, head_rows, pairs, documents},
                        useful_flops, executed_flops, attention_flops (of the executed), products, elementwise,
                        optimizer, transfers[], parts[]: {"name", "seconds"} (which add up to the step's), seconds,
                        kept_per_second, represented_per_second, mfu
    run                 steps (or null), mean_step_seconds, hours, device_hours, cost, price,
                        events[]: {"name", "seconds", "count", "share", "how"}
    nodes[], variants[] alternatives: nodes, deepspeed, verdict, memory, represented_per_second, mean_step_seconds,
                        hours, device_hours, cost
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bico_ds.planner.decisions import Decisions
from bico_ds.planner.items import Item
from bico_ds.planner.plan import Plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.text import assumptions, fit_word, verdict, warnings


def plan_as_json(plan: Plan, decisions: Decisions, notes: Sequence[str]) -> dict[str, Any]:
    """The object that this module describes, JSON-able."""
    change = decisions.change
    return {
        "recipe": plan.recipe.name,
        "verdict": fit_word(plan.memory),
        "sentence": verdict(plan, change),
        "warnings": warnings(plan),
        "assumptions": assumptions(plan),
        "notes": list(notes),
        "change": change and {"words": list(change.words), "memory": _range(change.plan.memory.peak.bytes)},
        "largest_micro_batch": decisions.micro_batch,
        "deployment": _deployment(plan),
        "model": {
            "parameters": plan.architecture.parameters,
            "trained_parameters": plan.architecture.trained_parameters(plan.recipe.model.lora),
            "source": plan.architecture.source,
        },
        "texts": {
            "source": plan.texts.source,
            "mean_length": float(plan.texts.lengths.mean()),
            "tokens": plan.texts.tokens,
        },
        "memory": _memory(plan),
        "host": _items(plan.host),
        "nvme": _items(plan.nvme),
        "disk": _items(plan.disk),
        "steps": _steps(plan),
        "run": _run(plan),
        "nodes": [_alternative(other) for other in decisions.nodes],
        "variants": [_alternative(other) for other in decisions.variants.values()],
    }


def _deployment(plan: Plan) -> dict[str, Any]:
    deployment = plan.deployment
    return {
        "device": deployment.device.name,
        "title": deployment.device.title,
        "nodes": deployment.nodes,
        "ranks_per_node": deployment.ranks_per_node,
        "ranks": deployment.ranks,
        "deepspeed": str(plan.recipe.deepspeed.config),
        "zero_stage": deployment.zero.stage,
    }


def _memory(plan: Plan) -> dict[str, Any]:
    memory = plan.memory
    moments = [
        {
            "name": moment.name,
            "objective": moment.objective,
            "bytes": _range(moment.bytes),
            "items": _items(moment.items),
            "is_peak": moment is memory.peak,
        }
        for moment in memory.moments
    ]
    return {"available": memory.available, "resident": _items(memory.resident), "moments": moments}


def _steps(plan: Plan) -> list[dict[str, Any]]:
    ranges = (
        "products",
        "elementwise",
        "optimizer",
        "seconds",
        "kept_per_second",
        "represented_per_second",
        "mfu",
    )
    counts = ("rows", "live_rows", "head_rows", "pairs", "documents")
    return [
        {
            "objective": step.objective,
            "probability": step.probability,
            "micro_batch": {name: getattr(batch, name) for name in counts},
            "useful_flops": step.flops.useful,
            "executed_flops": step.flops.executed,
            "attention_flops": step.flops.attention,
            **{name: _range(getattr(step, name)) for name in ranges},
            "transfers": [
                {"name": t.name, "bytes": t.bytes, "seconds": _range(t.seconds), "how": t.how}
                for t in step.transfers
            ],
            "parts": [
                {"name": part.value, "seconds": _range(seconds)} for part, seconds in step.parts.items()
            ],
        }
        for batch, step in zip(plan.batches, plan.steps, strict=True)
    ]


def _run(plan: Plan) -> dict[str, Any]:
    events = [
        {
            "name": event.name,
            "seconds": _range(event.seconds),
            "count": event.count,
            "share": _range(event.share),
            "how": event.how,
        }
        for event in plan.run.events
    ]
    return {"steps": plan.run.steps, "price": plan.price, **_time_and_money(plan), "events": events}


def _time_and_money(plan: Plan) -> dict[str, Any]:
    names = ("mean_step_seconds", "hours", "device_hours", "cost")
    return {name: _range(getattr(plan.run, name)) for name in names}


def _alternative(plan: Plan) -> dict[str, Any]:
    return {
        "nodes": plan.deployment.nodes,
        "deepspeed": str(plan.recipe.deepspeed.config),
        "verdict": fit_word(plan.memory),
        "memory": _range(plan.memory.peak.bytes),
        "represented_per_second": _range(plan.represented_per_second),
        **_time_and_money(plan),
    }


def _items(items: Iterable[Item]) -> list[dict[str, Any]]:
    return [{"name": item.name, "bytes": _range(item.bytes), "how": item.how} for item in items]


def _range(found: Range | None) -> dict[str, float] | None:
    return None if found is None else {"low": found.low, "high": found.high}
