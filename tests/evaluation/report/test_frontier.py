"""The frontier of a comparison: which models are on it, from real run folders and result files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bico_ds.commands.show.compare import main
from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.comparison import compare_runs
from bico_ds.evaluation.report.frontier import Panel, Point, Series, panels
from bico_ds.evaluation.report.runs import load_runs
from bico_ds.evaluation.results import EvaluationResult, TaskResult


def _task(score: float) -> TaskResult:
    interval = (max(0.0, score - 0.1), min(1.0, score + 0.1))
    return TaskResult(
        headline="contains", metrics={"contains": score}, intervals={"contains": interval}, new_tokens=9
    )


def _perplexity(value: float, text: str = "a") -> dict[str, object]:
    return {"perplexity": value, "text_sha256": text, "window": 64, "tokens": 100}


def _result(
    path: Path, score: float, texts: dict[str, float], *, model: str = "m", base: float | None = 12.0
):
    """A result file as `bico-ds evaluate --retention` writes it."""
    values = EvaluationResult(tasks={"n2d_reverse": _task(score)}).to_json()
    values |= {"model": model, "retention": {name: _perplexity(x) for name, x in texts.items()}}
    if base is not None:
        values["retention_before"] = {name: _perplexity(base) for name in texts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def _run(folder: Path, evaluations: dict[int, tuple[float | None, float]]) -> Path:
    """A run folder whose evaluations have a score (not before the first step) and a perplexity of `help`."""
    folder.mkdir()
    base = evaluations[0][1]
    lines = []
    for step, (score, perplexity) in evaluations.items():
        line = {"step": step, "kind": "evaluation", "evaluation/text/help/perplexity": perplexity}
        line["evaluation/text/help/times_base"] = perplexity / base
        if score is not None:
            line["evaluation/n2d_reverse/contains"] = score
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_frontier_holds_the_points_that_no_other_one_beats():
    draw = np.random.default_rng(8)
    points = [
        Point(name=str(i), perplexity=float(draw.integers(1, 20)), base=None, score=float(draw.integers(20)))
        for i in range(40)
    ]
    panel = Panel(text="t", task="k", metric="contains", series=[Series(label="r", points=points)])

    def beats(one: Point, other: Point) -> bool:
        no_worse = one.perplexity <= other.perplexity and one.score >= other.score
        return no_worse and (one.perplexity, one.score) != (other.perplexity, other.score)

    expected = {(x.perplexity, x.score) for x in points if not any(beats(y, x) for y in points)}
    assert {(x.perplexity, x.score) for x in panel.frontier} == expected
    assert 1 < len(expected) < len(points)


def test_a_run_gives_a_point_for_each_evaluation_that_has_a_score(tmp_path):
    run = _run(tmp_path / "run", {0: (None, 12.0), 100: (0.2, 18.0), 200: (0.9, 30.0)})
    (panel,) = panels(load_runs([run]))
    (series,) = panel.series
    assert panel.text == "help" and panel.bases == [12.0]
    assert [(x.name, x.perplexity, x.score) for x in series.points] == [
        ("100", 18.0, 0.2),
        ("200", 30.0, 0.9),
    ]


def test_blends_of_one_model_are_one_line_in_the_order_of_their_shares(tmp_path):
    files = [
        _result(tmp_path / f"b{share}.json", share, {"TEXT": 12 + share}, model=f"/x/keep/blend-{share:.2f}")
        for share in (0.7, 0.3, 0.5)
    ]
    files.append(_result(tmp_path / "own.json", 0.9, {"TEXT": 14.0}))
    (panel,) = panels(load_runs(files))
    by_label = {series.label: [point.name for point in series.points] for series in panel.series}
    assert by_label == {"own": [""], "blends of keep": ["0.3", "0.5", "0.7"]}


def test_a_bases_perplexity_of_another_window_is_none_of_this_text(tmp_path):
    path = _result(tmp_path / "a.json", 0.5, {"TEXT": 15.0})
    values = json.loads(path.read_text())
    values["retention_before"]["TEXT"]["window"] = 65
    path.write_text(json.dumps(values))
    (panel,) = panels(load_runs([path]))
    assert panel.bases == [] and panel.points[0].base is None


def test_the_command_draws_and_lists_every_text_with_intervals(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = _run(tmp_path / "run", {0: (None, 12.0), 200: (0.9, 30.0)})
    export = _result(tmp_path / "export.json", 0.85, {"help": 15.0, "prose": 21.0})
    assert main([str(run), str(export), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| run | 200 | 30.00 | 2.50 | 0.900 | yes |" in page
    assert "| export | – | 15.00 | 1.25 | 0.850 [0.75, 0.95] | yes |" in page
    assert "n2d_reverse (contains) and the perplexity of prose" in page
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert figures["run"]["texts"]["help"][1] == {"step": 200, "perplexity": 30.0, "base": 12.0}


def test_one_text_can_be_chosen_and_an_unknown_text_or_task_is_named(tmp_path):
    export = _result(tmp_path / "export.json", 0.85, {"help": 15.0, "prose": 21.0})
    runs = load_runs([export])
    assert [panel.text for panel in panels(runs, text="prose")] == ["prose"]
    with pytest.raises(
        UserError, match=r"--text pros: no run has it \(did you mean 'prose'\?\); found: help"
    ):
        panels(runs, text="pros")
    with pytest.raises(UserError, match=r"--task n2d: no run has it.*; found: n2d_reverse"):
        panels(runs, task="n2d")


def test_without_a_perplexity_nothing_is_drawn(tmp_path):
    export = _result(tmp_path / "export.json", 0.85, {})
    out = io.StringIO()
    compare_runs([export], output=tmp_path / "out", console=Console(file=out, width=100))
    assert "frontier" not in out.getvalue() and not (tmp_path / "out" / "frontier.png").exists()
