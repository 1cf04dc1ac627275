"""Uncertainty of a mean where scores come in groups: those of the prompts about one person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NO_WIDTH = 1e-9  # resamples of the same gains differ by rounding


def clustered_interval(
    scores: Sequence[float],
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores`, resampling groups.

    Ten prompts about one person are right or wrong together: resampling prompts would make the interval too narrow. The
    statistic is the ratio of sums over the drawn groups, so that groups may differ in size.
    """
    sums, counts = _group_sums(scores, groups)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(scores: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of a mean of scores in 0 … 1, groups resampled; exact where all are 0 or all are 1."""
    first = scores[0]
    if first in (0.0, 1.0) and all(score == first for score in scores):
        return unanimous_interval(first, len(set(groups)))
    return clustered_interval(scores, groups)


def unanimous_interval(score: float, groups: int, *, level: float = 0.95) -> tuple[float, float]:
    """The exact interval (Clopper and Pearson's) of a mean where all scores, of so many groups, are 0, or all are 1.

    No resample differs there, so that `clustered_interval` has no width.
    """
    end = ((1 - level) / 2) ** (1 / groups)
    return (end, 1.0) if score else (0.0, 1 - end)


def gain_interval(gains: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of a mean of differences of scores in 0 … 1, groups resampled; `widened` where none differs."""
    return widened(clustered_interval(gains, groups), len(set(groups)))


def widened(interval: tuple[float, float], groups: int, *, level: float = 0.95) -> tuple[float, float]:
    """An interval of a mean of differences in −1 … 1; one without width gets that of what so many groups cannot show.

    If all groups have the same gain, the share of those that have it is at least `unanimous_interval`'s lower end; the
    others may have lost or gained all. Of two shares that are unanimous themselves it is as wide as both intervals.
    """
    low, high = interval
    if high - low > _NO_WIDTH:
        return interval
    share, _ = unanimous_interval(1.0, groups, level=level)
    return max(low * share - (1 - share), -1.0), min(high * share + (1 - share), 1.0)


def group_means(scores: ArrayLike, groups: Sequence[str]) -> NDArray[np.float64]:
    """The mean of each group's scores, groups in sorted order."""
    sums, counts = _group_sums(scores, groups)
    return sums / counts


def _group_sums(
    scores: ArrayLike, groups: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.signedinteger]]:
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(member, weights=np.asarray(scores, dtype=np.float64)).astype(np.float64)
    return sums, np.bincount(member)
