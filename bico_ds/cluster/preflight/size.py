"""How much disk space the next checkpoints of a run need."""

from __future__ import annotations

from pathlib import Path

from bico_ds.checkpoint import manifest
from bico_ds.config.schema import Recipe
from bico_ds.model.architecture import with_own_config
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import read_zero
from bico_ds.planner.storage import checkpoint_bytes, export_bytes
from bico_ds.runtime.run_folder import RunFolder


def next_checkpoints_bytes(recipe: Recipe, run: Path) -> float:
    """Bytes that must be free on the run folder's disk.

    This is the size of the checkpoints to keep and one being written, less those that exist already (at least one remains),
    and of the export.
    """
    architecture = read_architecture(with_own_config(recipe.model))
    zero = read_zero(recipe, hidden_size=architecture.hidden, ranks=1, ranks_per_node=1, on_cuda=False)
    one = checkpoint_bytes(recipe, architecture, zero)
    there = len(manifest.checkpoints_in(RunFolder(run).checkpoints))
    export = export_bytes(recipe, architecture) if recipe.checkpoint.export else 0
    kept = recipe.checkpoint.keep_last + (recipe.checkpoint.keep_best is not None)
    return max(kept + 1 - there, 1) * one + export
