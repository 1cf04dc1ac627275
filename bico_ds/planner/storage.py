"""Host memory and NVMe of a node, and disk for checkpoints, export and conversion."""

from __future__ import annotations

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Deployment, Zero
from bico_ds.planner.items import Item


def checkpoint_bytes(recipe: Recipe, architecture: Architecture, zero: Zero) -> float:
    """STUB: one checkpoint of a training state on disk."""
    return 12.0 * architecture.trained_parameters(recipe.model.lora)


def host_memory(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Item, ...]:
    """STUB: of one node, all its ranks."""
    return ()


def nvme(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Item, ...]:
    """STUB: of one node; nothing where DeepSpeed offloads nothing to NVMe."""
    return ()


def disk(recipe: Recipe, architecture: Architecture, zero: Zero) -> tuple[Item, ...]:
    """STUB: of the run folder: kept checkpoints, the one being written, the export, and a conversion meanwhile."""
    return ()
