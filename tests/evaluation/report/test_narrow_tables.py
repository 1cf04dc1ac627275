"""On 80 columns, and on 60, every table of results has its words and figures whole."""

from __future__ import annotations

from typing import Any

import pytest

from bico_ds.evaluation.report.frontier import Panel, Point, Series
from bico_ds.evaluation.report.paired import Difference
from bico_ds.evaluation.report.runs import Work
from bico_ds.evaluation.report.tables import (
    agreement_table,
    choice_tables,
    contamination_table,
    difference_table,
    frontier_table,
    result_table,
    retention_table,
    work_table,
)
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from tests.common.whole_words import check_whole

TASKS = ("n2d", "d2n", "n2d_reverse", "d2n_reverse")
TWO = ("tiny_bico", "tiny_ntp")
FOUR = (*TWO, "tiny_identity_bridge", "smollm2_135m_bico_keep")
INTERVAL = "1.000 [0.03, 1.00]"  # exact, of one person
PROMPT = {"prompt": "q", "answer": "a", "group": "0"}
AGREEMENT = (
    "agreement",
    "base_agreement",
    "identical_16",
    "identical_32",
    "log_prob",
    "base_log_prob",
    "log_prob_change",
)


def results_of(runs: tuple[str, ...]) -> dict[str, EvaluationResult]:
    task = TaskResult(
        headline="contains", metrics={"contains": 1.0}, intervals={"contains": (0.025, 1.0)},
        floors={"contains": 0.0125}, prompts=[PROMPT] * 300,
    )  # fmt: skip
    scores = {"metrics": {"contains": 1.0}, "intervals": {"contains": [0.025, 1.0]}, "prompts": 300}
    found = {"scores": {"same": scores, "reverse": scores}}
    return {
        run: EvaluationResult(tasks=dict.fromkeys(TASKS, task), training_texts=dict.fromkeys(TASKS, found))
        for run in runs
    }


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("runs", [TWO, FOUR], ids=len)
def test_scores_of_runs_side_by_side_or_below_each_other(runs, width):
    results = results_of(runs)
    for table, rows in ((result_table(results), 4), (contamination_table(results), 8)):
        text = check_whole(
            lambda console: console.print(table),  # noqa: B023
            width,
            may_differ={"task", "run", "score"},
            names_may_break=len(runs) > 2,
        )
        assert text.count(INTERVAL) == rows * len(runs)
        for word in ("contains", *TASKS):
            assert word in text.replace(":", " ").split()


def test_two_runs_stand_side_by_side_on_80_columns():
    text = check_whole(lambda console: console.print(result_table(results_of(TWO))), 80)
    assert f"{INTERVAL}  {INTERVAL}" in text


def other_tables(runs: tuple[str, ...]) -> list[Any]:
    done = Work(updates=125_000, rows=1_399_318_000, tokens=1_441_033_000, flops=1.59e21, seconds=123_456.7)
    gain = Difference(mean=-1.0, interval=(-1.0, -0.987), prompts=4096, persons=300)
    test = {"p_value": 1e-12}
    choice = {
        "intervals": {"difference": [-12.3, 14.5]}, "difference": 12.4, "rank": 1.25, "candidates": 10,
        "forced_choice": 0.98, "nll_per_token": 2.345, "t_test": test, "ks_test": test, "person_t_test": test,
    }  # fmt: skip
    kept = {
        "tokens": 301_234,
        "window": 1024,
        "perplexity": 988.123,
        "bits_per_byte": 1.2345,
        "text_sha256": "",
    }
    agreed = dict.fromkeys(AGREEMENT, 0.123) | {"intervals": {key: [-0.1, 0.234] for key in AGREEMENT}}
    points = [Point(name="100", perplexity=41.23, base=12.9, score=1.0, interval=(1.0, 1.0))] * 2
    panel = Panel(
        text="shakespeare",
        task="n2d_reverse",
        metric="contains",
        series=[Series(label=run, points=points) for run in runs],
    )
    return [
        work_table(dict.fromkeys(runs, done)),
        difference_table({task: {"contains": gain} for task in TASKS}, of=runs[1], minus=runs[0]),
        *choice_tables(dict.fromkeys(TASKS, choice)),
        retention_table({"shakespeare": kept}, {"shakespeare": kept}),
        agreement_table({"alpaca_questions": agreed}),
        frontier_table(panel),
    ]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("runs", [TWO, FOUR], ids=len)
def test_each_other_table(runs, number):
    table = other_tables(runs)[number]
    for width in (80, 60):
        first = {"run", "task", "text", "model"}
        check_whole(lambda console: console.print(table), width, may_differ=first, names_may_break=width < 80)
