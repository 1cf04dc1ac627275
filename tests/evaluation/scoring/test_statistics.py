from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from bico_ds.evaluation.report.tables import choice_tables
from bico_ds.evaluation.scoring.choice import choice_statistics
from bico_ds.evaluation.scoring.statistics import (
    clustered_interval,
    gain_interval,
    group_means,
    share_interval,
    unanimous_interval,
)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(11)


def test_interval_agrees_with_scipys_bootstrap_over_equal_groups(draw):
    scores = draw.normal(size=(30, 10)) + draw.normal(size=(30, 1))
    groups = np.repeat([f"person {i}" for i in range(30)], 10)
    low, high = clustered_interval(scores.ravel(), groups, resamples=20000)
    reference = stats.bootstrap(
        (scores.mean(axis=1),), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert low == pytest.approx(reference.low, abs=0.02)
    assert high == pytest.approx(reference.high, abs=0.02)


def test_prompts_of_one_person_count_as_one(draw):
    per_person = draw.integers(0, 2, size=30).astype(float)
    groups = [str(i) for i in range(30)]
    once = clustered_interval(per_person, groups)
    ten_times = clustered_interval(np.repeat(per_person, 10), np.repeat(groups, 10))
    assert once == ten_times
    one_group_each = clustered_interval(np.repeat(per_person, 10), [str(i) for i in range(300)])
    assert ten_times[1] - ten_times[0] > 2 * (one_group_each[1] - one_group_each[0])


def test_groups_of_unlike_size_are_weighted_by_their_scores():
    low, high = clustered_interval([1.0] * 9 + [0.0], ["a"] * 9 + ["b"])
    assert (low, high) == (0.0, 1.0)
    assert group_means([1.0, 3.0, 5.0], ["b", "a", "b"]).tolist() == [3.0, 3.0]


def test_choice_statistics_against_scipy_and_by_hand(draw):
    log_probs = draw.normal(size=(40, 5))
    log_probs[:, 0] += 0.7
    groups = [str(i // 4) for i in range(40)]
    result = choice_statistics(log_probs, np.full(40, 3), groups)
    right, first = log_probs[:, 0], log_probs[:, 1]
    assert result["t_test"]["p_value"] == pytest.approx(stats.ttest_ind(right, first, equal_var=False).pvalue)
    assert result["ks_test"]["statistic"] == pytest.approx(stats.ks_2samp(right, first).statistic)
    difference = (right - log_probs[:, 1:].mean(axis=1)).reshape(10, 4).mean(axis=1)
    zeros = np.zeros(10)
    assert result["person_t_test"]["p_value"] == pytest.approx(stats.ttest_rel(difference, zeros).pvalue)
    assert result["rank"] == pytest.approx(np.mean([stats.rankdata(-row)[0] for row in log_probs]))
    assert result["forced_choice"] == pytest.approx(np.mean(log_probs.argmax(axis=1) == 0))
    assert result["forced_choice_chance"] == 0.2
    assert result["nll_per_token"] == pytest.approx(-right.mean() / 3)


def test_a_tie_is_no_right_choice():
    result = choice_statistics(np.zeros((4, 2)), np.ones(4, dtype=int), ["a", "a", "b", "b"])
    assert result["forced_choice"] == 0.0
    assert result["rank"] == 2.0


def test_a_test_that_is_not_defined_is_null_in_the_file_and_a_dash_in_the_table():
    result = choice_statistics(np.full((4, 3), -2.0), np.ones(4, dtype=int), ["a", "a", "b", "b"])
    assert json.loads(json.dumps(result, allow_nan=False))["person_t_test"]["p_value"] is None
    with io.StringIO() as out:
        for table in choice_tables({"t": result}):
            Console(file=out, width=80).print(table)
        assert "nan" not in out.getvalue()
        assert "–" in out.getvalue()


def test_the_tables_of_the_log_probability_test_fit_into_80_columns(draw):
    result = choice_statistics(
        200 * draw.normal(size=(40, 10)), np.full(40, 3), [str(i // 4) for i in range(40)]
    )
    with io.StringIO() as out:
        for table in choice_tables({"child_to_parent": result}):
            Console(file=out, width=80).print(table)
        assert "…" not in out.getvalue()
        assert f"{result['person_t_test']['p_value']:.0e}" in out.getvalue()


def test_the_interval_of_a_unanimous_answer_is_scipys_exact_one():
    for groups in (1, 20, 300):
        for score in (0.0, 1.0):
            exact = stats.binomtest(round(score * groups), groups).proportion_ci(0.95, method="exact")
            assert unanimous_interval(score, groups) == pytest.approx((exact.low, exact.high))


def test_no_interval_of_a_share_has_no_width(draw):
    """Ten people of whom all were right are no proof that everybody is."""
    groups = [str(number // 3) for number in range(30)]
    for score in (0.0, 1.0):
        assert share_interval([score] * 30, groups) == unanimous_interval(score, 10)
    mixed = draw.permutation([1.0] * 29 + [0.0]).tolist()
    assert share_interval(mixed, groups) == clustered_interval(mixed, groups)
    assert share_interval([0.5] * 30, groups) == (0.5, 0.5)  # no count of right answers


def test_no_interval_of_a_difference_has_no_width(draw):
    """Twelve persons of whom all gained, or none did, are no proof that everybody does."""
    groups = [str(number // 3) for number in range(36)]
    zeros, ones = unanimous_interval(0.0, 12), unanimous_interval(1.0, 12)
    assert gain_interval([0.0] * 36, groups) == pytest.approx((zeros[0] - zeros[1], zeros[1] - zeros[0]))
    assert gain_interval([1.0] * 36, groups) == pytest.approx((ones[0] - zeros[1], 1.0))
    assert gain_interval([-1.0] * 36, groups) == pytest.approx((-1.0, zeros[1] - ones[0]))
    # What one person gained and lost is no gain of hers, and again all persons are alike.
    assert gain_interval([1.0, -1.0, 0.0] * 12, groups) == gain_interval([0.0] * 36, groups)
    mixed = draw.permutation([1.0] * 20 + [0.0] * 16).tolist()
    assert gain_interval(mixed, groups) == clustered_interval(mixed, groups)
