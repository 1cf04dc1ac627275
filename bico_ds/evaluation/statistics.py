"""Uncertainty of a score, and the tests that Berglund et al. use on log-probabilities (arXiv 2309.12288)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clustered_interval(
    scores: Sequence[float],
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores`, resampling whole groups.

    Ten prompts about one person stand or fall together: resampling rows would make the interval too narrow.
    The statistic is the ratio of sums over the drawn groups, so that groups may differ in size.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(member, weights=np.asarray(scores, dtype=np.float64))
    counts = np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
