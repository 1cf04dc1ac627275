"""Where a step goes, by the names that the profile, `explain-step` and the planner share. No torch here."""

from __future__ import annotations

from enum import Enum


class StepPart(Enum):
    """A part of a step; the value is its name, and every second of a step belongs to one part."""

    ATTENTION_PASSES = "attention passes"
    ATTENTION_FUSED = "attention fused"
    ATTENTION_MERGE = "attention merge"
    LIVE_ROWS = "live rows"
    ROTATION = "rotation"
    LINEAR_LAYERS = "linear layers"
    HEAD_AND_LOSS = "head and loss"
    NORMS = "norms"
    GATES_AND_OTHER_ELEMENTWISE = "gates and other elementwise"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"
    DATA = "data"
    HOST_WAITS = "host waits"
    OTHER = "other"
