"""What would run: everything is built but weights, ranks and GPU."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bico_ds.attention.packed import choose_backend
from bico_ds.config.load import dump_recipe
from bico_ds.config.schema import Recipe
from bico_ds.engine import materials
from bico_ds.engine.ds_config import build_ds_config, gradient_accumulation
from bico_ds.engine.optimization import check_schedule
from bico_ds.engine.start import check
from bico_ds.model.build import build_model, parameter_count


def dry_run(recipe: Recipe) -> None:
    """Validate the recipe, build the pack plan and one batch of each objective, print the table of the run.

    Ranks: `distributed.world_size`, else WORLD_SIZE of the environment, else 1. Raises `UserError`.
    """
    world_size = recipe.distributed.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) != 0:
        return
    console = Console(soft_wrap=True)
    console.print(dump_recipe(recipe), highlight=False, markup=False)
    check(recipe, world_size)
    model = build_model(
        recipe.model, seed=recipe.seed, ds_config=None, device="meta", longest_document=recipe.data.capacity
    )
    build_ds_config(
        recipe, world_size=world_size, hidden_size=model.config.hidden_size, on_cuda=False, run_folder=Path("runs")
    )
    goods = materials.gather(recipe, weights_needed=False)
    loader = materials.build_loader(recipe, goods, rank=0, world_size=world_size)
    steps = materials.total_steps(recipe, loader)
    check_schedule(recipe.schedule, steps)
