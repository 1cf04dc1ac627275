"""Where a step of a recipe goes on this machine: trains a few steps in a folder of their own."""

from __future__ import annotations

from pathlib import Path

from bico_ds.config.schema import Recipe
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.profile.request import ProfileRequest
from bico_ds.training.profile.table import Profile, read_profile
from bico_ds.training.start import train

ORDINARY_STEPS = 10
"""Made before the profile: the first ones of a process are slower, and the others say what a step takes unrecorded."""


def profile_recipe(recipe: Recipe, folder: Path, *, stop: StopFlag) -> Profile:
    """Train `recipe` anew in the run folder `folder` until one step of each objective is profiled.

    Every rank calls it. No evaluation, no export, no numbers beside those in the folder; at the end a checkpoint is saved
    there, as a stopped run's. Raises what `train` raises, and `UserError` where no step could be profiled.
    """
    first = min(ORDINARY_STEPS, (recipe.training.steps or ORDINARY_STEPS + 1) - 1) + 1
    quiet = recipe.model_copy(
        update={
            "evaluation": recipe.evaluation.model_copy(update={"tasks": []}),
            "monitor": recipe.monitor.model_copy(update={"tensorboard": False, "csv": False, "wandb": None}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every_steps": None, "export": False}),
        }
    )
    request = ProfileRequest(first=first, steps=None, then_stop=True)
    train(quiet, output_dir=folder, resume="none", stop=stop, profile=request)
    return read_profile(folder, first)
