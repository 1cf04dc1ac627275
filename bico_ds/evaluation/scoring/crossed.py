"""Uncertainty of the mean of several runs that answered the same prompts: other seeds, and other persons, at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bico_ds.evaluation.scoring.statistics import unanimous_interval, widened


def crossed_interval(
    scores: ArrayLike,
    persons: Sequence[str],
    *,
    minus: ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores` [runs, prompts], in which runs and persons are resampled.

    `persons`: of each prompt. Persons are crossed with runs: one that is drawn is drawn in all of them, with all prompts
    (Owen's pigeonhole bootstrap, arXiv 0712.1111). Of R runs R − 1 are drawn, without which the part of the variance that is
    the runs' would be too small by (R − 1) / R (Rao and Wu 1988). Where the person matters as much as the seed, or more, the
    interval covers the true mean in 93 to 95 % of simulations, already with 2 runs. Where runs differ far more than that, 2
    or 3 of them say little: it then covers 74 or 83 %. So the lowest and highest run belong beside it.

    `minus` [other runs, prompts]: the interval is that of the difference of both means, with the same persons
    drawn for both; of scores in 0 … 1, and `widened` where no resample differs. Scores in 0 … 1 that are all 0, or all 1,
    have the exact interval over persons.
    """
    values, others = np.atleast_2d(scores), None if minus is None else np.atleast_2d(minus)
    if others is None and values[0, 0] in (0.0, 1.0) and (values == values[0, 0]).all():
        return unanimous_interval(float(values[0, 0]), len(set(persons)), level=level)
    draw = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(persons), return_inverse=True)
    drawn = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    prompts = drawn @ np.bincount(member)
    means = _drawn_sums(values, member, drawn, draw) / prompts
    if others is not None:
        means -= _drawn_sums(others, member, drawn, draw) / prompts
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    found = float(low), float(high)
    return found if others is None else widened(found, len(names), level=level)


def _drawn_sums(
    scores: NDArray[np.float64],
    member: NDArray[np.signedinteger],
    drawn: NDArray[np.signedinteger],
    draw: np.random.Generator,
) -> NDArray[np.float64]:
    """Of each resample the sum of scores over persons, each as often as `drawn`, averaged over runs that are drawn here."""
    by_person = np.array([np.bincount(member, weights=row) for row in scores])  # [runs, persons]
    runs = len(scores)
    size = max(1, runs - 1)
    shares = draw.multinomial(size, np.full(runs, 1 / runs), size=len(drawn)) / size
    return np.asarray(((shares @ by_person) * drawn).sum(axis=1))
