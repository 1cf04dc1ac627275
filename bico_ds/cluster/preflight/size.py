"""How much the next checkpoints of a run will weigh."""

from __future__ import annotations

from pathlib import Path

from bico_ds.config.load import merge_mappings
from bico_ds.config.schema import Recipe
from bico_ds.model.architecture import model_config, parameter_count
from bico_ds.runtime.ds_config import load_ds_config
from bico_ds.runtime.run_folder import RunFolder

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def next_checkpoints_bytes(recipe: Recipe, run: Path) -> float:
    """Bytes that the run folder's disk must have: the checkpoints kept and one being written, less those that are there
    (one at least), and the export.
    """
    parameters, weight = parameter_count(model_config(recipe.model)), _WEIGHT_BYTES[recipe.model.dtype]
    trained = parameters if recipe.model.lora is None else 0  # adapters are small, and the base is left out
    deepspeed = merge_mappings(load_ds_config(recipe.deepspeed.config), recipe.deepspeed.overrides)
    # Under ZeRO-3 a checkpoint holds the weights as master weights only; below it, a second time in their own type.
    partitioned = deepspeed.get("zero_optimization", {}).get("stage") == 3
    one = trained * (recipe.optimizer.state.bytes_per_parameter + (0 if partitioned else weight))
    there = len(list(RunFolder(run).checkpoints.glob("step-*")))
    export = parameters * weight if recipe.checkpoint.export else 0
    return max(recipe.checkpoint.keep_last + 1 - there, 1) * one + export
