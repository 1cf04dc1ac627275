"""Which objective a step has: drawn once per optimizer step, the same on every rank, and before the batch is built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.random_numbers import hash_words, uniform
from bico_ds.objectives.base import Objective


class ObjectiveSchedule:
    """Draws one of `objectives` for each step, by `probabilities` (positive, with sum 1), from a hash of (seed, step).

    Raises `ValueError` for other probabilities, or another number of them.
    """

    def __init__(self, objectives: Sequence[Objective], probabilities: Sequence[float], seed: int) -> None:
        if len(objectives) != len(probabilities) or not objectives:
            raise ValueError(
                f"{len(objectives)} objectives need as many probabilities, got {len(probabilities)}"
            )
        if min(probabilities) <= 0 or abs(sum(probabilities) - 1.0) > 1e-6:
            raise ValueError(
                f"objective probabilities must be positive and sum to 1, got {list(probabilities)}"
            )
        self.objectives = tuple(objectives)
        self.probabilities = tuple(probabilities)
        self._upper_edges = np.cumsum(probabilities)[:-1]
        self._seed = seed

    def __call__(self, step: int) -> Objective:
        return self.objectives[int(self.indices(step, step + 1)[0])]

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return int64 [stop - start]: the number of the objective of each step in start … stop - 1."""
        draws = uniform(hash_words("schedule", self._seed, np.arange(start, stop)))
        return np.searchsorted(self._upper_edges, draws, side="right")
