"""A resumed run follows its recipe, not the values that an optimizer and a schedule once began with."""

from __future__ import annotations

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from bico_ds.config.sections.optimizer import OptimizerSpec, ScheduleSpec
from bico_ds.optim.schedule import build_scheduler, follow_recipe


def adam_and_schedule(lr: float) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
    schedule = build_scheduler(ScheduleSpec(name="cosine", warmup_steps=3, min_lr_ratio=0.1), adam, 20)
    return adam, schedule  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
def test_every_decay_ends_at_the_floor(name):
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=2.0)
    decay = 10 if name == "warmup_stable_decay" else None
    spec = ScheduleSpec(name=name, warmup_steps=4, decay_steps=decay, min_lr_ratio=0.25)
    rates = advance(adam, build_scheduler(spec, adam, 20), 21)
    assert rates[4] == pytest.approx(2.0)
    assert rates[20] == pytest.approx(0.5)
    assert min(rates[4:]) == pytest.approx(0.5)


def test_linear_without_a_floor_is_transformers_linear():
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3) for _ in range(2))
    schedule = build_scheduler(ScheduleSpec(name="linear", warmup_steps=5), ours, 20)
    expected = get_linear_schedule_with_warmup(theirs, num_warmup_steps=5, num_training_steps=20)
    assert advance(ours, schedule, 22) == pytest.approx(advance(theirs, expected, 22), rel=1e-12)


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
