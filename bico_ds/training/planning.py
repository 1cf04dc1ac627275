"""The plan of a run whose loader is built, with its real texts and steps; and what other commands say of a plan."""

from __future__ import annotations

from collections.abc import Callable

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.planner.decisions import find_change
from bico_ds.planner.devices import Device, find_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.report.text import verdict, warnings
from bico_ds.planner.workload import Texts
from bico_ds.training import assembly


def plan_of_run(
    recipe: Recipe, loader: ElasticLoader, device: Device, *, nodes: int, ranks_per_node: int
) -> Plan:
    """Plan the run on `nodes` nodes of `ranks_per_node` ranks, each on a `device`. Raises `UserError` as `make_plan` does.

    The plan's recipe counts the steps that the loader gives its epochs.
    """
    steps = assembly.total_steps(recipe, loader)
    training = recipe.training.model_copy(update={"steps": steps, "epochs": None, "epochs_of": None})
    return make_plan(
        recipe.model_copy(update={"training": training}),
        device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        texts=Texts.of_objectives(recipe, loader.drawn, source="the run's own"),
    )


def verdict_lines(recipe: Recipe, plan_on: Callable[[Device], Plan]) -> list[str]:
    """What `plan_on` finds for the recipe's `distributed.gpu`, a line each; one line where there is no plan.

    Raises `UserError` for a GPU that is not known; a plan that is not possible is no mistake of the run's.
    """
    if recipe.distributed.gpu is None:
        named = "distributed.gpu, or bico-ds plan --gpu NAME"
        return [
            f"plan: none, as no GPU is named ({named}): whether it fits, how long it takes, what it costs"
        ]
    device = find_device(recipe.distributed.gpu)
    try:
        plan = plan_on(device)
    except UserError as error:
        return [f"plan: none: {error}"]
    return [
        *(f"warning: {warning}" for warning in warnings(plan)),
        f"plan: {verdict(plan, find_change(plan))}",
    ]
