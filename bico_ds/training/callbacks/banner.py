"""What is to run, in ten lines: what is known before the first step, in the words of dry runs and of the planner."""

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
from bico_ds.planner.report.text import fit_word

Banner = list[tuple[str, str]]
_SIZES = (("B", 1e9), ("M", 1e6))


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
    path = recipe.model.path
    begins = f"from {path}" if path is not None else f"random weights of seed {recipe.seed}"
    kernel = "oracle" if backend is None else backend.kernel.name
    return [
        ("model", f"{architecture.model_type}, {architecture.layers} layers of width {architecture.hidden}, {begins}"),
        ("parameters", _parameters(recipe, architecture)),
        ("ranks", f"{ranks} on {nodes} node{'s' * (nodes > 1)}; {recipe.deepspeed.config}: {_zero(zero)}"),
        ("precision, backend", f"{recipe.model.dtype}, attention {kernel}"),
        ("objectives", ", ".join(map(_objective, objective_names(recipe.objectives), recipe.objectives, probabilities))),
        ("data", "; ".join(_data(stream, recipe, steps, probabilities) for stream in streams)),
        ("global batch", _batch(recipe, ranks, steps)),
        ("memory", _memory(plan)),
        ("time", _time(plan)),
        ("run folder", place),
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
    name, unit = next((entry for entry in _SIZES if count >= entry[1]), ("", 1.0))
    return f"{number(count / unit)} {name}".rstrip()


def _zero(zero: Zero) -> str:
    parts = (("optimizer", zero.offload_optimizer), ("parameters", zero.offload_parameters))
    offloaded = [f"{what} offloaded to {where}" for what, where in parts if where != "none"]
    return ", ".join([f"ZeRO {zero.stage}", *offloaded])


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
    share = sum(p for name, p in zip(names, probabilities, strict=True) if name in stream.objectives)
    epochs = steps * share * recipe.training.global_batch_bins / stream.bins
    whose = f"for {', '.join(stream.objectives)}: " if len(stream.objectives) < len(names) else ""
    return (
        f"{whose}{stream.sequences:,} sequences, {stream.tokens:,} tokens in {stream.bins:,} bins, "
        f"fill {stream.fill:.3f}; {number(epochs)} epochs"
    )


def _batch(recipe: Recipe, ranks: int, steps: int) -> str:
    batch, micro = recipe.training.global_batch_bins, recipe.training.micro_batch_bins
    accumulation = micro_batches_per_rank(batch, micro, ranks)
    return (
        f"{batch} bins = {ranks} ranks x {accumulation} micro-batches x {micro} bins, at most "
        f"{batch * recipe.data.capacity:,} tokens; {steps:,} steps"
    )


def _memory(plan: Plan | None) -> str:
    if plan is None:
        return "not planned"
    memory = plan.memory
    return f"{fit_word(memory)}: {gib(memory.peak.bytes)} of {number(memory.available / GIB)} GiB at the peak, planned"


def _time(plan: Plan | None) -> str:
    if plan is None or not math.isfinite(plan.run.mean_step_seconds.high):
        return "not planned"
    whole = "" if plan.run.hours is None else f", {time(plan.run.hours.times(3600))} in all"
    return f"{time(plan.run.mean_step_seconds)} per step{whole}, planned"
