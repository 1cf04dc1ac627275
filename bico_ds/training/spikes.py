"""A loss or gradient norm far above what it was: divergence that is still finite. No torch here.

What the factors and limits were chosen by was measured: docs/benchmarks/drills.md, Spikes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bico_ds.config.schema import Recipe
from bico_ds.training.callbacks.base import Callback, RunStart, StepReport

WINDOW = 100  # steps of an objective that its medians are taken over
FEWEST = 20  # steps of an objective before which nothing is judged
# Medians near 0 (texts that are known by heart) make every ratio large: so far above its median a loss must be, in nats, …
LEAST_RISE = 1.0
# … and so large a norm.
LEAST_NORM = 10.0


@dataclass(frozen=True, kw_only=True)
class Spike:
    """What is too large (`loss`, in nats, or `gradient norm`) in a step of `objective`, and the median that it exceeds."""

    what: str
    objective: str
    value: float
    factor: float
    median: float

    def __str__(self) -> str:
        name = f"{self.what} of {self.objective}"
        return f"the {name} is {self.value:.3g}, over {self.factor:g} times its running median, {self.median:.3g}"


@dataclass
class _History:
    """The last ordinary steps of one objective, oldest first, and how many followed its last spike (None: it had none)."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    since_spike: int | None = None


class SpikeDetector(Callback):
    """Compares each step with the medians of the ordinary steps of its objective before it; the same on every rank.

    Steps of the warm-up, without a target or without an update are left out, and so are spikes: a divergence that lasts does
    not become the measure. A checkpoint keeps the history.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._loss_factor, self._norm_factor = recipe.training.spike_factors
        self._first_step = recipe.schedule.warmup_steps + 1
        self._histories: dict[str, _History] = {}

    def find(self, step: int, objective: str, *, loss: float, grad_norm: float | None = None) -> Spike | None:
        """The spike in a step, which counts from 1; None for an ordinary one, or where too little is known yet.

        Without `grad_norm` the loss alone is judged.
        """
        history = self._histories.get(objective, _History())
        if step < self._first_step or len(history.losses) < FEWEST or not math.isfinite(loss):
            return None  # what is not finite is not this module's: `bico_ds.training.nonfinite`
        usual, factor = median(history.losses), self._loss_factor
        if loss > max(factor * usual, usual + LEAST_RISE):
            return Spike(what="loss", objective=objective, value=loss, factor=factor, median=usual)
        usual, factor = median(history.grad_norms), self._norm_factor
        if grad_norm is not None and grad_norm > max(factor * usual, LEAST_NORM):
            return Spike(
                what="gradient norm", objective=objective, value=grad_norm, factor=factor, median=usual
            )
        return None

    def is_first(self, objective: str) -> bool:
        """Whether a spike now is the first one after `FEWEST` ordinary steps of its objective, or of all."""
        since = self._histories.get(objective, _History()).since_spike
        return since is None or since >= FEWEST

    def on_start(self, start: RunStart) -> None:
        for objective, saved in start.saved.get("spikes", {}).items():
            self._histories[objective] = _History(
                deque(saved["losses"], WINDOW), deque(saved["grad_norms"], WINDOW), saved["since_spike"]
            )

    def on_step(self, report: StepReport) -> None:
        numbers = (report.loss, report.grad_norm)
        if report.step < self._first_step or not report.targets or not all(map(math.isfinite, numbers)):
            return
        history = self._histories.setdefault(report.objective, _History())
        if report.is_spike:
            history.since_spike = 0
            return
        history.losses.append(report.loss)
        history.grad_norms.append(report.grad_norm)
        if history.since_spike is not None:
            history.since_spike += 1

    def state(self) -> dict[str, Any]:
        histories = {
            objective: {
                "losses": list(history.losses),
                "grad_norms": list(history.grad_norms),
                "since_spike": history.since_spike,
            }
            for objective, history in self._histories.items()
        }
        return {"spikes": histories}
