"""What is to run, in ten lines: what is known before the first step, in the same words at a start and in a dry run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bico_ds.attention.backend import Backend
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.sample_order import StreamReport
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Zero
from bico_ds.planner.plan import Plan
from bico_ds.planner.report.quantities import GIB, gib, number, time
from bico_ds.planner.report.text import fit_word, where

Banner = list[tuple[str, str]]
_SIZES = (("B", 1e9), ("M", 1e6))
_MOST_MISSING = 12


def banner(
    recipe: Recipe,
    *,
    architecture: Architecture,
    zero: Zero,
    backend: Backend | None,
    ranks: int,
    nodes: int,
    steps: int,
    probabilities: Sequence[float],
    streams: Sequence[StreamReport],
    plan: Plan | None,
    place: str,
) -> Banner:
    """Labels, and a text each. `probabilities`: of each objective in a step; `place`: where the run writes, and since when.

    `backend`: None for the oracle. `plan`: None where there is none; then memory and time are said to be unknown.
    """
    return [
        *what_runs(
            recipe,
            architecture=architecture,
            zero=zero,
            attention="oracle" if backend is None else backend.kernel.name,
            ranks=ranks,
            nodes=nodes,
            steps=steps,
            probabilities=probabilities,
            streams=streams,
        ),
        ("memory", _planned(None if plan is None else memory_text(plan))),
        ("time", _planned(None if plan is None else time_text(plan))),
        ("run folder", place),
    ]


def plan_row(plan: Plan | str) -> tuple[str, str]:
    """Memory, time and the deployment that they are for; or why there is no plan."""
    if isinstance(plan, str):
        return "plan", plan
    return "plan", "; ".join(filter(None, [memory_text(plan), time_text(plan), where(plan)]))


def missing_rows(missing: Sequence[str]) -> Banner:
    """A row for each thing, the first of them labelled, of as many as a reader takes in."""
    shown = list(missing[:_MOST_MISSING])
    if (more := len(missing) - len(shown)) > 0:
        shown.append(f"and {more} more")
    return [("" if number else "missing", line) for number, line in enumerate(shown)]


def what_runs(
    recipe: Recipe,
    *,
    architecture: Architecture,
    zero: Zero | None,
    attention: str,
    ranks: int,
    nodes: int,
    steps: int,
    probabilities: Sequence[float],
    streams: Sequence[StreamReport],
) -> Banner:
    """The seven lines that no plan is needed for, from the model to the steps.

    `zero`: None where it cannot be read for a plan. `attention`: by what it is computed.
    """
    path = recipe.model.path
    begins = f"from {path}" if path is not None else f"random weights of seed {recipe.seed}"
    return [
        ("model", f"{architecture.model_type}, {architecture.layers} layers of width {architecture.hidden}, {begins}"),
        ("parameters", _parameters(recipe, architecture)),
        ("ranks", f"{ranks} on {nodes} node{'s' * (nodes > 1)}; {_deepspeed(recipe, zero)}"),
        ("precision, backend", f"{recipe.model.dtype}, attention {attention}"),
        ("objectives", ", ".join(map(_objective, objective_names(recipe.objectives), recipe.objectives, probabilities))),
        ("data", "; ".join(_data(stream, recipe, steps, probabilities) for stream in streams)),
        ("global batch", _batch(recipe, ranks, steps, streams, probabilities)),
    ]  # fmt: skip


def _parameters(recipe: Recipe, architecture: Architecture) -> str:
    """As `8.03 B, of which 41.9 M are trained`."""
    every, lora = _size(architecture.parameters), recipe.model.lora
    if lora is None:
        return f"{every}, all trained"
    return (
        f"{every}, of which adapters of rank {lora.rank} train {_size(architecture.trained_parameters(lora))}"
    )


def _size(count: int) -> str:
    """As `8.03 B`, `41.9 M` or `960`."""
    name, unit = next((entry for entry in _SIZES if count >= entry[1]), ("", 1.0))
    return f"{number(count / unit)} {name}".rstrip()


def _deepspeed(recipe: Recipe, zero: Zero | None) -> str:
    """As `zero3_offload_cpu: ZeRO 3, optimizer offloaded to cpu`."""
    config = str(recipe.deepspeed.config)
    if zero is None:
        return config
    parts = (("optimizer", zero.offload_optimizer), ("parameters", zero.offload_parameters))
    offloaded = [f"{what} offloaded to {where}" for what, where in parts if where != "none"]
    return f"{config}: {', '.join([f'ZeRO {zero.stage}', *offloaded])}"


def _objective(name: str, spec: ObjectiveSpec, probability: float) -> str:
    """As `bico 50% (15% masked, by token)`."""
    share = f"{name} {100 * probability:.3g}%"
    mask = getattr(spec, "mask", None)
    if not isinstance(mask, MaskSpec):
        return share
    low, high = mask.rate if isinstance(mask.rate, tuple) else (mask.rate, mask.rate)
    rate = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    of_what = "" if mask.eligible == "all" else f" of the {mask.eligible}"
    return f"{share} ({rate} masked{of_what}, by {mask.unit})"


def _data(stream: StreamReport, recipe: Recipe, steps: int, probabilities: Sequence[float]) -> str:
    names = objective_names(recipe.objectives)
    whose = f"for {', '.join(stream.objectives)}: " if len(stream.objectives) < len(names) else ""
    return (
        f"{whose}{stream.sequences:,} sequences, {stream.tokens:,} tokens in {stream.bins:,} bins, "
        f"fill {stream.fill:.3f}; {number(_epochs(stream, recipe, steps, probabilities))} epochs"
    )


def _epochs(stream: StreamReport, recipe: Recipe, steps: int, probabilities: Sequence[float]) -> float:
    names = objective_names(recipe.objectives)
    share = sum(p for name, p in zip(names, probabilities, strict=True) if name in stream.objectives)
    return steps * share * recipe.training.global_batch_bins / stream.bins


def _batch(
    recipe: Recipe, ranks: int, steps: int, streams: Sequence[StreamReport], probabilities: Sequence[float]
) -> str:
    batch, micro = recipe.training.global_batch_bins, recipe.training.micro_batch_bins
    accumulation = micro_batches_per_rank(batch, micro, ranks)
    tokens = sum(stream.tokens * _epochs(stream, recipe, steps, probabilities) for stream in streams)
    return (
        f"{batch} bins = {ranks} ranks x {accumulation} micro-batches x {micro} bins, at most "
        f"{batch * recipe.data.capacity:,} tokens; {steps:,} steps, {_size(round(tokens))} tokens in all"
    )


def _planned(text: str | None) -> str:
    return "not planned" if text is None else f"{text}, planned"


def memory_text(plan: Plan) -> str:
    """As `fits: 27.9 to 37.4 of 79.1 GiB at the peak`."""
    memory = plan.memory
    return f"{fit_word(memory)}: {gib(memory.peak.bytes)} of {number(memory.available / GIB)} GiB at the peak"


def time_text(plan: Plan) -> str | None:
    """As `1.89 to 5.90 s per step, 0.329 to 3.27 h in all`; None where the device's speed is not known."""
    if not math.isfinite(plan.run.mean_step_seconds.high):
        return None
    whole = "" if plan.run.hours is None else f", {time(plan.run.hours.times(3600))} in all"
    return f"{time(plan.run.mean_step_seconds)} per step{whole}"
