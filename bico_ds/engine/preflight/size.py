"""How much the next checkpoints of a run will weigh."""

from __future__ import annotations

from pathlib import Path

from bico_ds.config.schema import Recipe
from bico_ds.engine.run_folder import RunFolder
from bico_ds.model.architecture import model_config, parameter_count

_STATE_BYTES = 12  # fp32 master weight and both Adam moments, a trained parameter
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def next_checkpoints_bytes(recipe: Recipe, run: Path) -> float:
    """Bytes that the run folder's disk must have: the checkpoints kept, one being written, and the export."""
    parameters, weight = parameter_count(model_config(recipe.model)), _WEIGHT_BYTES[recipe.model.dtype]
    trained = parameters if recipe.model.lora is None else 0  # adapters are small, and the base is left out
    one = trained * (_STATE_BYTES + weight)
    there = len(list(RunFolder(run).checkpoints.glob("step-*")))
    export = parameters * weight if recipe.checkpoint.export else 0
    return max(recipe.checkpoint.keep_last + 1 - there, 1) * one + export
