"""What tasks and metrics are called, and which of them a word of the command line means."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.metric_keys import chosen_metric, less_is_better, numbers_of_line
from bico_ds.evaluation.report.plots import _panel_lines, legend_columns
from bico_ds.evaluation.report.wording import is_reverse, pairs_and_others, title_of


@pytest.mark.parametrize(
    ("task", "title", "reverse"),
    [
        ("n2d_reverse", "N2D-reverse: description → name", True),
        ("d2n_reverse", "D2N-reverse: name → description", True),
        ("n2d", "N2D: name → description", False),
        ("d2n", "D2N: description → name", False),
        ("company_forward", "company, forward", False),
        ("company_backward", "company, backward", True),
        ("backward", "backward", True),
        ("my_poems_previous_line", "my_poems, previous line", True),
        ("next_line", "next line", False),
        ("celebs_child_to_parent", "celebs, child → parent", False),
        ("parent_to_child", "parent → child", False),
        ("policy", "policy", False),
        ("hand_me_forwards", "hand_me_forwards", False),
    ],
)
def test_a_task_in_words(task, title, reverse):
    assert (title_of(task), is_reverse(task)) == (title, reverse)


def test_directions_of_one_set_are_a_pair_where_both_were_asked():
    pairs, others = pairs_and_others(["policy", "a_backward", "b_backward", "a_forward", "n2d_reverse"])
    assert [pair[1:] for pair in pairs] == [("a_forward", "a_backward"), ("n2d", "n2d_reverse")]
    assert others == ["policy", "b_backward"]


def test_of_more_tasks_than_fit_those_asked_the_other_way_round_have_panels():
    tasks = [f"q{number}" for number in range(7)] + ["x_forward", "x_backward", "n2d", "n2d_reverse"]
    lines, are_pairs = _panel_lines(tasks)
    assert [line[1:] for line in lines] == [
        ("x_forward", "x_backward"), ("n2d", "n2d_reverse"), ("q0", "q1"), ("q2", "q3")
    ]  # fmt: skip
    assert not are_pairs
    assert _panel_lines(["d2n", "n2d_reverse"]) == (
        [("trained name first", "n2d", "n2d_reverse"), ("trained description first", "d2n", "d2n_reverse")], True
    )  # fmt: skip


def test_a_legend_has_as_many_columns_as_its_labels_leave_room_for():
    assert legend_columns(["short"] * 9, 10.0) == 5
    assert legend_columns(["short"] * 2, 10.0) == 2
    assert legend_columns(["x" * 40] * 9, 10.0) == 2
    assert legend_columns(["x" * 400], 10.0) == 1


METRICS = [
    "a/headline", "a/contains", "ab/headline", "text/wiki/perplexity", "text/wiki/times_base",
    "held_out/mine/ntp", "held_out/mine/bico", "held_out/other/ntp",
]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "metric"),
    [
        ("a", "a/headline"),
        ("a/contains", "a/contains"),
        ("wiki", "text/wiki/perplexity"),
        ("wiki/times_base", "text/wiki/times_base"),
        ("other", "held_out/other/ntp"),
        ("held_out/mine/bico", "held_out/mine/bico"),
    ],
)
def test_a_word_of_the_command_line_means_a_metric(word, metric):
    assert chosen_metric("--sort", word, METRICS) == metric


def test_an_unknown_metric_is_refused_with_the_nearest_and_one_of_several_with_all():
    with pytest.raises(
        UserError, match=r"^--sort wikis: no run has it .did you mean 'wiki'.*; found: a, a/contains, ab"
    ):
        chosen_metric("--sort", "wikis", METRICS)
    with pytest.raises(UserError, match=r"^--sort mine: which one\? held_out/mine/ntp, held_out/mine/bico$"):
        chosen_metric("--sort", "mine", METRICS)


def test_perplexities_losses_and_ranks_are_the_better_the_lower():
    lower = {"text/wiki/perplexity", "text/wiki/times_base", "held_out/mine/ntp", "a/nll", "a/rank"}
    for metric in (*METRICS, "a/nll", "a/rank", "a/difference"):
        assert less_is_better(metric) == (metric in lower or metric.startswith(("text/", "held_out/")))


def test_the_metrics_of_a_line_are_its_finite_numbers_but_for_times_and_ends_of_intervals():
    line = {
        "step": 3, "evaluation/a/headline": 0.5, "evaluation/a/headline_low": 0.1, "evaluation/seconds": 2.0,
        "evaluation/a/nll": float("nan"), "evaluation/a/x": "y", "work/rows": 3, "evaluation/held_out/m/ntp": 2,
    }  # fmt: skip
    assert numbers_of_line(line) == {"a/headline": 0.5, "held_out/m/ntp": 2.0}
