"""How much disk space the next checkpoints of a run need."""

from __future__ import annotations

from pathlib import Path

from bico_ds.config.deepspeed_file import written_ds_config
from bico_ds.config.schema import Recipe
from bico_ds.model.architecture import model_config, parameter_count
from bico_ds.runtime.run_folder import RunFolder

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def next_checkpoints_bytes(recipe: Recipe, run: Path) -> float:
    """Bytes that must be free on the run folder's disk.

    This is the size of the checkpoints to keep and one being written, less those that exist already (at least one remains),
    and of the export.
    """
    parameters, weight = parameter_count(model_config(recipe.model)), _WEIGHT_BYTES[recipe.model.dtype]
    # Of a LoRA run, checkpoints hold the adapters alone, which are small.
    trained = parameters if recipe.model.lora is None else 0
    deepspeed = written_ds_config(recipe.deepspeed)
    # Under ZeRO-3 a checkpoint holds the weights as master weights only; below ZeRO-3 also in the model's dtype.
    partitioned = deepspeed.get("zero_optimization", {}).get("stage") == 3
    one = trained * (recipe.optimizer.state.bytes_per_parameter + (0 if partitioned else weight))
    there = len(list(RunFolder(run).checkpoints.glob("step-*")))
    export = parameters * weight if recipe.checkpoint.export else 0
    return max(recipe.checkpoint.keep_last + 1 - there, 1) * one + export
