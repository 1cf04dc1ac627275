"""The plan of a run whose loader is built, with its real texts and steps; what other commands say of a plan.

The plan of a start is for the devices that it runs on: GPUs by data sheet, CPUs by a product that is timed here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.model.architecture import with_own_config
from bico_ds.planner.decisions import find_change
from bico_ds.planner.deployment import spread
from bico_ds.planner.devices import Device, cpu_device, device_named, find_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.report.text import verdict, warnings
from bico_ds.planner.workload import Texts
from bico_ds.runtime import host_memory, launch_environment
from bico_ds.runtime.device_speed import multiply
from bico_ds.runtime.peak_memory import PeakMemory
from bico_ds.training import assembly
from bico_ds.training.checks import RANKS_PER_NODE
from bico_ds.training.run import Run

_log = logging.getLogger(__name__)

_TIMED_SECONDS = 0.1
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def plan_of_run(
    recipe: Recipe, loader: ElasticLoader, device: Device, *, nodes: int, ranks_per_node: int
) -> Plan:
    """Plan the run on `nodes` nodes of `ranks_per_node` ranks, each on a `device`. Raises `UserError` as `make_plan` does.

    The plan's recipe counts the steps that the loader gives its epochs, and gives the objectives their shares of steps.
    """
    steps = assembly.total_steps(recipe, loader)
    training = recipe.training.model_copy(update={"steps": steps, "epochs": None, "epochs_of": None})
    objectives = [
        spec.model_copy(update={"probability": probability})
        for spec, probability in zip(recipe.objectives, loader.schedule.probabilities, strict=True)
    ]
    return make_plan(
        recipe.model_copy(update={"training": training, "objectives": objectives, "share_by": "steps"}),
        device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        texts=Texts.of_objectives(recipe, loader.drawn, source="the run's own"),
    )


def verdict_lines(recipe: Recipe, plan_on: Callable[[Device], Plan]) -> list[str]:
    """What `plan_on` finds for the recipe's `distributed.gpu`, a line each; one line where there is no plan.

    Raises `UserError` as `plan_for_gpu` does.
    """
    return lines_of(plan_for_gpu(recipe, plan_on))


def plan_for_gpu(recipe: Recipe, plan_on: Callable[[Device], Plan]) -> Plan | str:
    """The plan on the recipe's `distributed.gpu`, or why there is none.

    Raises `UserError` for a GPU that is not known; a plan that is not possible is no mistake of the run's.
    """
    if recipe.distributed.gpu is None:
        named = "distributed.gpu, or bico-ds plan --gpu NAME"
        return f"none, as no GPU is named ({named}): whether it fits, how long it takes, what it costs"
    device = find_device(recipe.distributed.gpu)
    try:
        return plan_on(device)
    except UserError as error:
        return f"none: {error}"


def lines_of(plan: Plan | str) -> list[str]:
    """Warnings, and the verdict, of what `plan_for_gpu` returns."""
    if isinstance(plan, str):
        return [f"plan: {plan}"]
    return [
        *(f"warning: {warning}" for warning in warnings(plan)),
        f"plan: {verdict(plan, find_change(plan))}",
    ]


@dataclass(frozen=True, kw_only=True)
class StartPlan:
    """The plan of a start, and `memory`, which counts from before the model was built."""

    plan: Plan
    memory: PeakMemory


def plan_of_start(run: Run, loader: ElasticLoader) -> StartPlan | None:
    """The plan of this run on the devices that are there; None, with a line in the log, where there can be none.

    For rank 0 alone, while the other ranks wait: on CPUs a matrix product is timed.
    """
    try:
        per_node = launch_environment.ranks_per_node() or RANKS_PER_NODE
        nodes, ranks_per_node = spread(run.ranks.world_size, per_node)
        device = device_here(run.ranks.device, run.recipe.model.dtype, ranks_per_node=ranks_per_node)
        recipe = run.recipe.model_copy(update={"model": with_own_config(run.recipe.model)})
        plan = plan_of_run(recipe, loader, device, nodes=nodes, ranks_per_node=ranks_per_node)
    except Exception as error:
        # The plan only tells: whatever is wrong with it must not end a run.
        _log.warning("this run has no plan, and no MFU: %s: %s", type(error).__name__, error)
        return None
    if math.isnan(device.bf16_flops):
        _log.warning("no data sheet of %s is known: memory is planned; time and MFU are not", device.name)
    return StartPlan(plan=plan, memory=PeakMemory(run.ranks.device))


def device_here(device: torch.device, dtype: str, *, ranks_per_node: int) -> Device:
    """What a rank of this machine computes on: memory as it is here; of a GPU without a known data sheet no rates (NaN).

    On CPUs the peak is that of a product in `dtype`, "bf16" or "fp32", by this process's threads.
    """
    if device.type == "cpu":
        flops, _ = multiply(device, _DTYPES[dtype], seconds=_TIMED_SECONDS)
        return cpu_device(memory_bytes=host_memory.memory_limit(), flops=flops, ranks=ranks_per_node)
    name = torch.cuda.get_device_name(device)
    _, memory_bytes = torch.cuda.mem_get_info(device)
    known = device_named(name)
    return (
        _of_memory_alone(name, memory_bytes) if known is None else replace(known, memory_bytes=memory_bytes)
    )


def _of_memory_alone(name: str, memory_bytes: int) -> Device:
    return Device(
        name=name,
        title=name,
        memory_bytes=memory_bytes,
        bf16_flops=math.nan,
        fp32_flops=math.nan,
        memory_bandwidth=math.nan,
        link_bandwidth=math.nan,
        network_bandwidth=math.nan,
        host_bandwidth=math.nan,
        per_node=torch.cuda.device_count(),
        source="torch.cuda.mem_get_info; no data sheet's rates are known",
    )
