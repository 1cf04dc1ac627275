"""What the loop tells its listeners. Every rank calls every callback, so that a callback may use collectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bico_ds.config.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known when the loop begins; `saved` is what `Callback.state` returned at the checkpoint."""

    recipe: Recipe
    first_step: int
    total_steps: int
    summary: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, summed over all ranks.

    `loss` is the mean over the `targets` of the global batch. `kept_tokens` went through the model,
    `represented_tokens` counts the original tokens behind them. `seconds` is the wall time of the step on this rank,
    `wait_seconds` the part of it spent waiting for data (mean over ranks). `fill` is represented tokens over capacity.
    `sources` counts rows and tokens consumed since step 0, by data source.
    """

    step: int
    objective: str
    loss: float
    targets: int
    grad_norm: float
    learning_rate: float
    kept_tokens: int
    represented_tokens: int
    fill: float
    seconds: float
    wait_seconds: float
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    applied: bool = True


class Callback:
    """Overrides what it needs."""

    def on_start(self, start: RunStart) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        """Numbers that come apart from the steps: evaluations, checkpoints, data sources."""

    def on_message(self, text: str) -> None:
        """A line for whoever watches."""

    def on_end(self, step: int, state: str) -> None: ...

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, JSON-able, under keys of this callback's own."""
        return {}


class Callbacks(Callback):
    """All callbacks as one."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self._callbacks = callbacks

    def on_start(self, start: RunStart) -> None:
        for callback in self._callbacks:
            callback.on_start(start)

    def on_step(self, report: StepReport) -> None:
        for callback in self._callbacks:
            callback.on_step(report)

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_numbers(step, kind, numbers)

    def on_message(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_message(text)

    def on_end(self, step: int, state: str) -> None:
        for callback in self._callbacks:
            callback.on_end(step, state)

    def state(self) -> dict[str, Any]:
        return {key: value for callback in self._callbacks for key, value in callback.state().items()}
