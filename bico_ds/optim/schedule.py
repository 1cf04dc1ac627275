"""The learning-rate schedule: transformers' ones, and a linear one with a floor."""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from bico_ds.common.errors import UserError
from bico_ds.config.sections.optimizer import OptimizerSpec, ScheduleSpec
from bico_ds.optim.table import kind_of

# transformers' name and its name for the floor; its `linear` knows none
_KINDS = {
    "constant": ("constant_with_warmup", None),
    "cosine": ("cosine_with_min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("warmup_stable_decay", "min_lr_ratio"),
}


def check_schedule(spec: ScheduleSpec, total_steps: int) -> None:
    """Raise `UserError` where the phases are longer than the run."""
    phases = spec.warmup_steps + (spec.decay_steps or 0)
    if phases > total_steps:
        raise UserError(
            f"schedule: warmup_steps ({spec.warmup_steps}) and decay_steps ({spec.decay_steps or 0}) "
            f"are more than the {total_steps} steps of the run"
        )


def build_scheduler(spec: ScheduleSpec, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule, with one `step()` per optimizer step."""
    if spec.name == "linear":
        return LambdaLR(optimizer, partial(_linear, spec=spec, total_steps=total_steps))
    name, floor = _KINDS[spec.name]
    specific: dict[str, float] = {}
    if floor is not None:
        specific[floor] = spec.min_lr_ratio
    if spec.name == "warmup_stable_decay":
        assert spec.decay_steps is not None
        specific["num_decay_steps"] = spec.decay_steps
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=spec.warmup_steps,
        num_training_steps=None if spec.name == "constant" else total_steps,
        scheduler_specific_kwargs=specific,
    )


def _linear(step: int, *, spec: ScheduleSpec, total_steps: int) -> float:
    """The share of the full rate: up over the warmup, then down to the floor, which the last step's end reaches."""
    if step < spec.warmup_steps:
        return step / spec.warmup_steps
    left = max(0, total_steps - step) / max(1, total_steps - spec.warmup_steps)
    return spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * left


def follow_recipe(optimizer: Optimizer, scheduler: LambdaLR, spec: OptimizerSpec) -> None:
    """After a load, set the recipe's values instead of the checkpoint's, at the step that the schedule has reached."""
    scheduler.base_lrs = [spec.lr] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group |= kind_of(spec).hyperparameters(spec)
        group |= {"initial_lr": spec.lr, "lr": spec.lr * factor(scheduler.last_epoch)}
