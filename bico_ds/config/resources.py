"""Recipes, DeepSpeed configurations and the batch script, of a checkout or of an installed package.

In a checkout they are at the top level, where people edit them. A wheel carries copies in bico_ds/resources/, under the
same names (setup.py puts them there); that folder exists in no checkout.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("bico_ds")))
_CARRIED = _PACKAGE / "resources"

CHECKOUT = None if _CARRIED.is_dir() else _PACKAGE.resolve().parent
"""The checkout that this package is part of; None where it is installed from a wheel."""

_ROOT = CHECKOUT or _CARRIED
RECIPES = _ROOT / "recipes"
DS_CONFIGS = _ROOT / "ds_configs"
BATCH_SCRIPT = _ROOT / "launch" / "slurm" / "train.sbatch"
