"""How long an optimizer step takes: ranges, from peaks and assumed efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.communication import Transfer
from bico_ds.planner.deployment import Deployment
from bico_ds.planner.flops import StepFlops
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step of an objective; `flops` of all ranks and micro-batches, seconds of wall time.

    `kept_per_second` and `represented_per_second`: tokens per device; `mfu`: of useful operations.
    """

    objective: str
    probability: float
    flops: StepFlops
    products: Range
    elementwise: Range
    transfers: tuple[Transfer, ...]
    seconds: Range
    kept_per_second: Range
    represented_per_second: Range
    mfu: Range


def step_time(
    recipe: Recipe, architecture: Architecture, deployment: Deployment, batch: MicroBatch
) -> StepTime:
    """STUB"""
    one = Range(1.0, 2.0)
    return StepTime(
        objective=batch.objective,
        probability=batch.probability,
        flops=StepFlops(useful=1.0, products=1.0, attention=0.0),
        products=one,
        elementwise=one,
        transfers=(),
        seconds=one,
        kept_per_second=one,
        represented_per_second=one,
        mfu=Range(0.3, 0.4),
    )
