"""The plan of a run whose loader is built: its real texts and steps, for any device."""

from __future__ import annotations

from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.planner.devices import Device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.workload import Texts
from bico_ds.training import assembly


def plan_of_run(
    recipe: Recipe, loader: ElasticLoader, device: Device, *, nodes: int, ranks_per_node: int
) -> Plan:
    """Plan the run on `nodes` nodes of `ranks_per_node` ranks, each on a `device`. Raises `UserError` as `make_plan` does.

    The plan's recipe counts the steps that the loader gives its epochs.
    """
    steps = assembly.total_steps(recipe, loader)
    training = recipe.training.model_copy(update={"steps": steps, "epochs": None})
    return make_plan(
        recipe.model_copy(update={"training": training}),
        device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        texts=Texts.of(loader.sequence_lengths(), source="the run's own"),
    )
