"""The optimizers that a run can have, found by the recipe's section, by DeepSpeed's name, or by what runs.

To add one: its bytes in `config/optimizers.py`, its keys in `config/sections/optimizer.py`, a file beside this one with a
class that fulfils `OptimizerKind`, and its place in `OPTIMIZERS`.
"""

from __future__ import annotations

from torch.optim import Optimizer

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.sections.optimizer import OptimizerSpec
from bico_ds.optim.adamw import AdamW
from bico_ds.optim.base import OptimizerKind

OPTIMIZERS: tuple[OptimizerKind, ...] = (AdamW(),)


def kind_of(spec: OptimizerSpec) -> OptimizerKind:
    """The optimizer of a recipe's section."""
    return next(kind for kind in OPTIMIZERS if kind.spec is type(spec))


def kind_named(ds_type: str, where: str) -> OptimizerKind:
    """The optimizer that DeepSpeed knows by this name. Raises `UserError` where it is none of ours; `where`: the file."""
    for kind in OPTIMIZERS:
        if ds_type.lower() in (name.lower() for name in kind.ds_types):
            return kind
    known = [name for kind in OPTIMIZERS for name in kind.ds_types]
    raise UserError(
        f"deepspeed: optimizer.type: '{ds_type}' is not one of {', '.join(known)}{did_you_mean(ds_type, known)} in {where}"
    )


def kind_running(optimizer: Optimizer) -> OptimizerKind:
    """The optimizer that this object of torch's or DeepSpeed's is."""
    return next(kind for kind in OPTIMIZERS if isinstance(optimizer, kind.classes))
