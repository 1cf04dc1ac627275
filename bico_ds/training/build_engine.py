"""DeepSpeed's engine around the model of a run."""

from __future__ import annotations

from typing import Any

import deepspeed

from bico_ds.config.schema import Recipe
from bico_ds.data.tokenizer import needed_vocabulary
from bico_ds.model.architecture import adopt_special_tokens, check_vocabulary, model_config
from bico_ds.model.build import TrainableModel, build_model, check_rotary
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.optim.schedule import build_scheduler
from bico_ds.training.assembly import RunInputs
from bico_ds.training.run import Run


def build_engine(run: Run, inputs: RunInputs, steps: int, *, is_universal: bool) -> Engine:
    """The model in DeepSpeed's engine, for `steps` optimizer steps; `is_universal`: it will load a universal checkpoint.

    Collective. Raises `UserError` for a tokenizer that does not belong to the model, and what `build_model` and
    `wrap_model` refuse.
    """
    recipe = run.recipe
    config = model_config(recipe.model)
    needed = needed_vocabulary(inputs.tokenizer, config.vocab_size)
    check_vocabulary(config.vocab_size, needed, tokenizer=str(inputs.tokenizer_path))
    ds_config = dict(run.ds_config)
    if is_universal:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    model: TrainableModel = build_model(
        recipe.model,
        seed=recipe.seed,
        ds_config=ds_config,
        device=run.ranks.device,
        longest_document=recipe.data.capacity,
    )
    adopt_special_tokens(inputs.exported_tokenizer, model.causal_lm.config, model.causal_lm.generation_config)
    return wrap_model(model, recipe, ds_config, steps)


def wrap_model(model: TrainableModel, recipe: Recipe, ds_config: dict[str, Any], steps: int) -> Engine:
    """DeepSpeed's engine around a model, with the recipe's optimizer and its schedule over `steps` steps. Collective.

    Raises `UserError` where this DeepSpeed has rounded the rotary frequencies.
    """
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: build_scheduler(recipe.schedule, optimizer, steps),
        dist_init_required=False,
    )
    check_rotary(model)
    return engine
