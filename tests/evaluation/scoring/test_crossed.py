"""The interval of several runs on the same prompts, beside a slow definition, a theory and simulations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bico_ds.evaluation.scoring.crossed import crossed_interval
from bico_ds.evaluation.scoring.statistics import clustered_interval, gain_interval, unanimous_interval


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng()


def slow_means(
    scores: np.ndarray, persons: Sequence[str], draw: np.random.Generator, count: int
) -> list[float]:
    """Means of resamples by the words of the definition: draw runs, draw persons, collect all their prompts."""
    names = sorted(set(persons))
    means = []
    for _ in range(count):
        runs = draw.integers(len(scores), size=len(scores) - 1)
        who = [names[number] for number in draw.integers(len(names), size=len(names))]
        answers = [
            scores[run][i] for run in runs for name in who for i in range(len(persons)) if persons[i] == name
        ]
        means.append(float(np.mean(answers)))
    return means


def test_the_interval_is_that_of_the_definition_drawn_one_by_one(draw):
    persons = [f"p{number}" for number in draw.integers(8, size=24)]
    # A mean far from 0 shows whether sums are divided by the number of the prompts that were drawn.
    scores = 9 + draw.normal(size=(4, 1)) + draw.normal(size=(4, 24))
    expected = np.quantile(slow_means(scores, persons, draw, 4000), [0.025, 0.975])
    found = crossed_interval(scores, persons, resamples=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.06 * (expected[1] - expected[0]) + 0.01)


def test_one_run_has_the_interval_over_persons(draw):
    persons = [str(number // 4) for number in range(120)]
    scores = draw.integers(2, size=120).astype(float)
    alone = crossed_interval([scores], persons, resamples=20_000)
    assert alone == pytest.approx(clustered_interval(scores.tolist(), persons, resamples=20_000), abs=0.01)


def test_runs_that_differ_widen_the_interval_and_copies_of_one_run_do_not_narrow_it(draw):
    persons = [str(number) for number in range(100)]
    scores = draw.normal(size=(1, 100))
    width = np.diff(crossed_interval(scores, persons))[0]
    copies = np.diff(crossed_interval(np.repeat(scores, 5, axis=0), persons))[0]
    apart = np.diff(crossed_interval(scores + np.arange(5)[:, None], persons))[0]
    assert copies == pytest.approx(width, rel=0.15)
    # The variance of the mean of 0, 1, 2, 3, 4 is 2.5 / 5.
    assert apart == pytest.approx(2 * 1.96 * np.sqrt(0.5 + (width / 3.92) ** 2), rel=0.15)


def test_what_both_groups_share_of_a_person_cancels_in_the_difference(draw):
    persons = [str(number // 2) for number in range(80)]
    person = np.repeat(draw.normal(size=40), 2)
    first, second = (person + gain + draw.normal(scale=0.05, size=(3, 80)) for gain in (0.0, 0.4))
    low, high = crossed_interval(second, persons, minus=first)
    assert low < float((second - first).mean()) < high
    assert high - low < 0.3 * np.diff(crossed_interval(second, persons))[0]


def test_where_no_answer_differs_the_interval_is_exact_over_persons():
    persons = [str(number // 5) for number in range(50)]
    for score in (0.0, 1.0):
        assert crossed_interval(np.full((3, 50), score), persons) == unanimous_interval(score, 10)


def test_a_difference_in_which_no_answer_differs_is_as_wide_as_that_of_two_runs(draw):
    persons = [str(number // 5) for number in range(50)]
    for ours, theirs in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
        found = crossed_interval(np.full((3, 50), ours), persons, minus=np.full((2, 50), theirs))
        assert found == pytest.approx(gain_interval([ours - theirs] * 50, persons))
        assert found[1] - found[0] > 0.3
    same = draw.integers(2, size=(1, 50)).astype(float)
    assert crossed_interval(same, persons, minus=same) == gain_interval([0.0] * 50, persons)


@pytest.mark.parametrize(("runs", "seed_sd", "least"), [(3, 0.05, 0.90), (10, 0.2, 0.88)])
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says(runs, seed_sd, least):
    """Seeds, persons and answers drawn anew 300 times; 0.95 less four standard errors of 300 draws would be 0.90."""
    draw = np.random.default_rng(24)
    persons = [str(number // 4) for number in range(160)]
    covered = 0
    for number in range(300):
        levels = draw.normal(0, seed_sd, (runs, 1)) + np.repeat(draw.normal(0, 0.3, 40), 4)
        scores = levels + draw.normal(0, 0.3, (runs, 160))
        low, high = crossed_interval(scores, persons, resamples=500, seed=number)
        covered += low <= 0.0 <= high
    assert least < covered / 300 <= 0.985
