"""How long a run takes, with its evaluations and checkpoints, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Deployment
from bico_ds.planner.ranges import Range
from bico_ds.planner.step_time import StepTime


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that stops the training now and then: seconds of one, how many there are, their share of the run."""

    name: str
    seconds: Range
    count: int
    share: Range
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """A whole run; None where its number of steps is not known. `cost` in the unit of the price per GPU-hour."""

    steps: int | None
    mean_step_seconds: Range
    events: tuple[Event, ...]
    hours: Range | None
    device_hours: Range | None
    cost: Range | None


def run_time(
    recipe: Recipe,
    architecture: Architecture,
    deployment: Deployment,
    steps: int | None,
    step_times: Sequence[StepTime],
    *,
    price: float | None,
    disk_bandwidth: Range,
) -> RunTime:
    """STUB"""
    return RunTime(
        steps=steps, mean_step_seconds=Range(1.0, 2.0), events=(), hours=None, device_hours=None, cost=None
    )
