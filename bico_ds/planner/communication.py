"""What the ranks of a step send each other, and how long the links take."""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.deployment import Deployment
from bico_ds.planner.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of collective in an optimizer step: bytes that a rank sends, and seconds by the links it crosses."""

    name: str
    bytes: float
    seconds: Range
    how: str = ""


def transfers(recipe: Recipe, architecture: Architecture, deployment: Deployment) -> tuple[Transfer, ...]:
    """STUB"""
    return ()
