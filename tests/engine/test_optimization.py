"""A resumed run follows its recipe, not the values that an optimizer and a schedule once began with."""

from __future__ import annotations

import pytest
import torch

from bico_ds.config.schema import OptimizerSpec, ScheduleSpec
from bico_ds.engine.optimization import build_scheduler, follow_recipe


def adam_and_schedule(lr: float) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
    schedule = build_scheduler(ScheduleSpec(name="cosine", warmup_steps=3, min_lr_ratio=0.1), adam, 20)
    return adam, schedule  # type: ignore[return-value]


def advance(adam: torch.optim.AdamW, schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    return rates


def test_a_lower_learning_rate_counts_from_the_step_resumed_at():
    lower = advance(*adam_and_schedule(1e-4), 20)
    adam, schedule = adam_and_schedule(1e-3)
    advance(adam, schedule, 8)
    saved = adam.state_dict(), schedule.state_dict()
    adam, schedule = adam_and_schedule(1e-4)
    adam.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert adam.param_groups[0]["lr"] > 5e-4, "torch brings the old rate back"
    follow_recipe(adam, schedule, OptimizerSpec(lr=1e-4, weight_decay=0.5))
    assert advance(adam, schedule, 12) == pytest.approx(lower[8:], rel=1e-12)
    assert adam.param_groups[0]["weight_decay"] == 0.5
