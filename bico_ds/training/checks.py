"""What can be refused before data, weights or other ranks are needed, so that a mistake costs seconds."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.checkpoint.manifest import FoundCheckpoint
from bico_ds.common.errors import UserError
from bico_ds.config.resources import RECIPES
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.retention import REPLAY
from bico_ds.data.loading.sample_order import StreamReport
from bico_ds.model.architecture import first_layers, meta_model, model_config
from bico_ds.model.lora import check_lora
from bico_ds.model.swap import check_attention
from bico_ds.optim.schedule import check_schedule
from bico_ds.runtime import launch_environment
from bico_ds.runtime.ds_config import build_ds_config

RANKS_PER_NODE = 8  # where no launcher sets it


def check_recipe(
    recipe: Recipe,
    *,
    world_size: int,
    on_cuda: bool,
    run_folder: Path,
    ranks_per_node: int | None = None,
    runs_here: bool = True,
) -> dict[str, Any]:
    """DeepSpeed's complete configuration for this recipe on `world_size` ranks; of the model only its config.json is read.

    Without `runs_here` (another machine will train) the paths in DeepSpeed's configuration stay as they were written.
    Raises `UserError` for another number of ranks than the recipe is made for, a schedule that does not fit its steps,
    and what `model_config`, `check_attention`, `check_lora` and `build_ds_config` refuse.
    """
    expected = recipe.distributed.world_size
    if expected is not None and expected != world_size:
        raise UserError(
            f"distributed.world_size: this recipe is made for {expected} ranks, started with {world_size}; "
            "start it with as many, or set distributed.world_size=null"
        )
    if recipe.training.steps is not None:
        check_schedule(recipe.schedule, recipe.training.steps)
    config = model_config(recipe.model)
    check_attention(config, longest_document=recipe.data.capacity)
    if recipe.model.lora is not None:
        check_lora(meta_model(first_layers(config)), recipe.model.lora)
    return build_ds_config(
        recipe,
        world_size=world_size,
        hidden_size=config.hidden_size,
        on_cuda=on_cuda,
        run_folder=run_folder,
        ranks_per_node=ranks_per_node or launch_environment.ranks_per_node() or RANKS_PER_NODE,
        runs_here=runs_here,
    )


def beyond_context(recipe: Recipe, streams: Sequence[StreamReport]) -> str | None:
    """A note where texts are longer than the model's context, which is no mistake where they are to extend it."""
    context, longest = model_config(recipe.model).max_position_embeddings, max(s.longest for s in streams)
    if longest <= context:
        return None
    return (
        f"texts of up to {longest:,} tokens are longer than the model's context of {context:,} "
        f"(max_position_embeddings), and it has not seen positions past that; data.capacity={context} cuts them"
    )


def what_may_be_lost(recipe: Recipe) -> str | None:
    """A note on a fine-tuning in which nothing keeps what the model knew; None for other runs.

    What keeps it is text beside the facts (`replay`, a source that is sampled or has a share of the tokens), or `retention`.
    The numbers are those of docs/benchmarks/results.md: SmolLM2-135M, full runs of BICO.
    """
    keeps = recipe.retention is not None or any(
        source.name == REPLAY or source.sampled is not None or source.token_share is not None
        for source in recipe.data.sources
    )
    if recipe.model.path is None or keeps:
        return None
    measured = "all weights: 12.9 to 988" if recipe.model.lora is None else "adapters alone: 12.9 to 2,655"
    keep = f"{recipe.name}_keep"
    named = f"recipe {keep} does, " if (RECIPES / f"{keep}.yaml").is_file() else ""
    return (
        "nothing here keeps the model's other abilities, with adapters or without (perplexity of other text in our runs of "
        f"SmolLM2-135M, {measured}); {named}see docs/retention.md"
    )


def without_missing_weights(recipe: Recipe) -> Recipe:
    """The recipe with `model.config` in the place of weights that are not on this machine: a dry run needs none."""
    path = recipe.model.path
    if path is None or path.is_here() or recipe.model.config is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": None})})


def without_missing_model(recipe: Recipe) -> tuple[Recipe, str | None]:
    """What a dry run can check without the model: `without_missing_weights`, and what was not to be found of the model.

    Where the recipe has no `model.config` either, some Llama stands in, without adapters.
    """
    planned = without_missing_weights(recipe)
    path = planned.model.path
    if path is None or path.is_here():
        return planned, None
    problem = f"model.path: '{path}' is not on this machine, and the recipe has no model.config"
    if not path.is_folder:
        problem = f"model.path: the hub cannot be reached for '{path}', and the recipe has no model.config"
        try:
            if hub_has_an_address():
                model_config(planned.model)
                return planned, None
        except UserError as error:
            problem = str(error)
    stand_in = {"path": None, "config": {"model_type": "llama"}, "lora": None}
    return planned.model_copy(update={"model": planned.model.model_copy(update=stand_in)}), problem


def hub_has_an_address() -> bool:
    """Whether it is worth the half minute after which the hub's client gives up; not known behind a proxy."""
    if any(urllib.request.getproxies()) or constants.HF_HUB_OFFLINE:
        return True  # by the proxy, or from the cache
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def find_backend(recipe: Recipe, device: torch.device) -> Backend | None:
    """The attention backend that will run, None for the oracle; logs once what `auto` takes.

    Raises `UserError` where the backend that the recipe names cannot run here.
    """
    config = model_config(recipe.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        return resolve(recipe.model.attention_backend, config.dtype, head_dim, device)
    except ValueError as error:
        raise UserError(f"model.attention_backend: {error}") from None


def check_backend(recipe: Recipe, device: torch.device) -> LayoutPolicy | None:
    """The layout policy of the attention backend that will run; the oracle has none. Raises as `find_backend` does."""
    backend = find_backend(recipe, device)
    return None if backend is None else backend.policy


def refuse_fewer_steps(recipe: Recipe, steps: int, found: FoundCheckpoint) -> None:
    """Raise `UserError` where a run of so many steps ends before the checkpoint that it would go on from."""
    if steps >= found.step:
        return
    asked = (
        f"training.steps: {steps:,} steps"
        if recipe.training.steps is not None
        else f"training.epochs: {recipe.training.epochs:g} epochs are {steps:,} steps, which"
    )
    raise UserError(
        f"{asked} are fewer than the {found.step:,} of the checkpoint '{found.path}': ask for more to go "
        "on, for as many to evaluate and export it, or name an earlier checkpoint (--resume RUN/checkpoints/step-N); "
        "--resume none starts anew"
    )
