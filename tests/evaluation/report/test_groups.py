"""Runs that repeat one another with other seeds: which are one group, its figures, and the command that shows them."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bico_ds.commands.show.compare import main
from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.evaluation.report.comparison import View, compare_runs
from bico_ds.evaluation.report.found_runs import runs_in
from bico_ds.evaluation.report.groups.grouping import group_remarks, grouped, members_of
from bico_ds.evaluation.report.groups.scores import GroupScores
from bico_ds.evaluation.report.page.source import read_runs
from bico_ds.evaluation.report.page.write import write_report
from bico_ds.evaluation.report.runs import load_runs
from bico_ds.evaluation.results import EvaluationResult, TaskResult

PERSONS, EACH = 10, 3
RATE = "objectives.bico.mask.rate"


def _task(right: np.ndarray) -> TaskResult:
    rows = [
        {"prompt": f"q{i}", "answer": " a", "group": str(i // EACH), "contains": float(score)}
        for i, score in enumerate(right)
    ]
    return TaskResult(
        headline="contains", metrics={"contains": float(right.mean())}, prompts=rows, new_tokens=9
    )


def _run(
    folder: Path,
    scores: Mapping[str, float],
    *overrides: str,
    steps: tuple[int, ...] = (100, 200),
    loss: float = 2.0,
) -> Path:
    """A run of tiny_bico whose answers are drawn with these probabilities, and kept."""
    draw = np.random.default_rng()
    (folder / "evaluation").mkdir(parents=True)
    lines = []
    for step in steps:
        tasks = {name: _task(draw.random(PERSONS * EACH) < score) for name, score in scores.items()}
        result = EvaluationResult(tasks=tasks)
        (folder / "evaluation" / f"step-{step:06d}.json").write_text(json.dumps(result.to_json()))
        line = {"step": step, "kind": "evaluation", "evaluation/held_out/mine/ntp": loss, **result.scalars()}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny_bico", list(overrides))))
    return folder


def _sweep(folder: Path, scores: Mapping[float, float]) -> Path:
    """Three seeds of each rate, and a run that was never evaluated."""
    for rate, score in scores.items():
        for seed in (1, 2, 10):
            name = f"rate={rate},seed={seed}"
            _run(
                folder / name,
                {"n2d_reverse": score, "company_backward": score},
                f"{RATE}={rate}",
                f"seed={seed}",
                f"name=r{rate}-s{seed}",
                loss=1 + rate + seed / 100,
            )
    (folder / "sweep.json").write_text("{}")
    (folder / "rate=0.9,seed=1").mkdir()
    (folder / "rate=0.9,seed=1" / "state.json").write_text('{"state": "failed"}')
    return folder


def _said(paths: list[Path], output: Path, **view: object) -> str:
    out = io.StringIO()
    compare_runs(paths, output=output, view=View(**view), console=Console(file=out, width=200))  # type: ignore[arg-type]
    return out.getvalue()


def _groups(paths: list[Path], *by: str):
    return grouped(members_of(load_runs(paths), paths), by)


def test_a_folder_of_runs_stands_for_its_runs_in_the_order_of_numbers_in_their_names(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.5: 0.5})
    assert [path.name for path in runs_in(sweep)] == [f"rate={x}" for x in
        ("0.5,seed=1", "0.5,seed=2", "0.5,seed=10", "0.9,seed=1")]  # fmt: skip
    assert runs_in(sweep / "rate=0.5,seed=1") == [] and runs_in(tmp_path / "nowhere") == []
    said = _said([sweep], tmp_path / "out")
    assert "left out: " in said and "rate=0.9,seed=1: no evaluation in metrics.jsonl" in said


def test_runs_that_differ_in_the_seed_and_in_names_alone_are_one_group(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.9, 0.15: 0.2})
    paths = [path for path in runs_in(sweep) if "0.9," not in path.name]
    groups = _groups(paths)
    assert [(group.label, [m.seed for m in group.members]) for group in groups] == [
        ("rate=0.15", ["1", "2", "10"]),
        ("rate=0.3", ["1", "2", "10"]),
    ]
    assert list(group_remarks(groups)) == []
    other = _run(tmp_path / "other", {"n2d_reverse": 0.5}, f"{RATE}=0.3", "optimizer.lr=1e-5", "seed=4")
    assert len(_groups([*paths, other])) == 3
    assert [group.label for group in _groups([*paths, other], RATE)] == ["rate=0.15", "rate=0.3"]
    result = paths[0] / "evaluation" / "step-000200.json"
    assert [len(group.members) for group in _groups([*paths, result])] == [3, 3, 1]


def test_groups_are_called_by_their_recipes_names_where_these_tell_them_apart(tmp_path):
    paths = [
        _run(tmp_path / f"s{seed}" / name, {"n2d": 0.5}, f"name={name}", f"seed={seed}", f"{RATE}={rate}")
        for seed in (1, 2)
        for name, rate in (("low", 0.1), ("high", 0.4))
    ]
    assert [group.label for group in _groups(paths)] == ["low", "high"]


def test_what_makes_runs_no_repetitions_is_said(tmp_path):
    paths = [
        _run(tmp_path / "a", {"n2d": 0.5}, "seed=1"),
        _run(tmp_path / "b", {"n2d": 0.5}, "seed=1", steps=(100, 300)),
        _run(tmp_path / "c", {"n2d": 0.5}, "seed=2", "optimizer.lr=1e-5"),
    ]
    notes = " ".join(group_remarks(_groups(paths, RATE)))
    assert "several runs have the seed 1" in notes
    assert "not all runs were evaluated last at the same step: 200 (a), 300 (b)" in notes
    assert "its runs differ in more than seeds: optimizer.lr" in notes


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"by": ["optimizer.lrr"]}, r"--by optimizer.lrr: no recipe .* \(did you mean 'optimizer.lr'\?\)"),
        ({"by": ["objectives.1.mask"]}, r"--by objectives.1.mask: is a section; name one of its keys: .*mask.rate"),
        ({"sort": "company_backwards"}, r"--sort company_backwards: no run has it \(did you mean 'company_backward'"),
    ],
)  # fmt: skip
def test_an_unknown_key_or_metric_is_refused_before_anything_is_written(tmp_path, view, message):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.9})
    with pytest.raises(UserError, match=message):
        _said([sweep], tmp_path / "out", **view)
    assert not (tmp_path / "out").exists()


def test_a_key_is_refused_for_a_run_whose_recipe_is_not_known(tmp_path):
    path = _run(tmp_path / "a", {"n2d": 0.5})
    (path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="a has no recipe.yaml that can be read"):
        _groups([path], RATE)


@pytest.mark.parametrize("key", ["objectives.1.mask.rate", "objectives[1].mask.rate", RATE])
def test_a_key_may_be_named_as_in_set(tmp_path, key):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.9, 0.15: 0.2})
    paths = [path for path in runs_in(sweep) if "0.9," not in path.name]
    assert [group.label for group in _groups(paths, key)] == ["rate=0.15", "rate=0.3"]


def test_figures_of_a_group_are_those_of_its_runs(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.7})
    runs = load_runs(paths := runs_in(sweep)[:3])
    scores = GroupScores(_groups(paths)[0])
    values = [run.final.tasks["n2d_reverse"].score for run in runs]
    spread = scores.spread("n2d_reverse/headline")
    assert spread is not None
    assert (spread.mean, spread.sd) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert (spread.lowest, spread.highest, spread.runs) == (min(values), max(values), 3)
    drawn = scores.as_run(bands_of_intervals=True)
    steps = [dict(run.curves["n2d_reverse"]) for run in runs]
    for step, mean in drawn.curves["n2d_reverse"]:
        assert mean == pytest.approx(statistics.mean(own[step] for own in steps))
    (last, low, high) = drawn.bands["n2d_reverse"][-1]
    assert (last, (low, high)) == (200, scores.interval("n2d_reverse")) and low < spread.mean < high
    ranges = scores.as_run(bands_of_intervals=False).bands["n2d_reverse"]
    assert ranges[-1] == (200, min(values), max(values))


def test_without_the_kept_answers_bands_are_ranges_and_there_is_no_interval(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.7})
    paths = runs_in(sweep)[:3]
    (paths[1] / "evaluation" / "step-000100.json").unlink()
    scores = GroupScores(_groups(paths)[0])
    assert not scores.has_bands_of_intervals and scores.interval("n2d_reverse") is not None
    (paths[1] / "evaluation" / "step-000200.json").unlink()
    assert GroupScores(_groups(paths)[0]).interval("n2d_reverse") is None


def test_runs_that_were_asked_other_questions_have_no_common_interval(tmp_path):
    paths = [_run(tmp_path / f"s{seed}", {"n2d": 0.5}, f"seed={seed}") for seed in (1, 2)]
    file = paths[1] / "evaluation" / "step-000200.json"
    values = json.loads(file.read_text())
    values["tasks"]["n2d"]["rows"][0]["prompt"] = "another one"
    file.write_text(json.dumps(values))
    assert GroupScores(_groups(paths)[0]).interval("n2d") is None
    assert "n2d: not the same prompts" in _said(paths, tmp_path / "out")


def test_the_command_shows_groups_sorted_by_any_metric_and_writes_all_formats(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    sweep, output = _sweep(tmp_path / "sweep", {0.15: 0.1, 0.3: 0.9, 0.5: 0.5}), tmp_path / "out"
    options = [str(sweep), "--output", str(output), "--format", "svg,pdf,png"]
    assert main([*options, "--sort", "company_backward"]) == 0
    said = capsys.readouterr().out
    assert "company, backward (company_backward, accuracy (contains))" in said
    assert "N2D-reverse: description → name (n2d_reverse, accuracy (contains))" in said
    assert said.index("│ rate=0.3 ") < said.index("│ rate=0.5 ") < said.index("│ rate=0.15 ")
    assert "rate=0.5 minus rate=0.3" in said and "held_out/mine/ntp" in said
    heads = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name in ("scores", "curves"):
        for suffix, head in heads.items():
            assert (output / f"{name}.{suffix}").read_bytes().startswith(head)
    page = (output / "comparison.md").read_text()
    assert page.index("## Groups of runs") < page.index("## Every run")
    assert main([*options, "--sort", "mine"]) == 0  # of a loss the lowest is the best
    said = capsys.readouterr().out
    assert said.index("│ rate=0.15 ") < said.index("│ rate=0.3 ") < said.index("│ rate=0.5 ")


def test_the_csv_has_every_run_and_group_with_its_settings_and_metrics(tmp_path):
    sweep, output = _sweep(tmp_path / "sweep", {0.15: 0.2, 0.3: 0.9}), tmp_path / "out"
    _said([sweep], output)
    rows = list(csv.DictReader((output / "comparison.csv").open(encoding="utf-8")))
    assert [row["row"] for row in rows] == ["run"] * 3 + ["group"] + ["run"] * 3 + ["group"]
    for start, rate in ((0, "0.15"), (4, "0.3")):
        group, members = rows[start + 3], rows[start : start + 3]
        assert {row[RATE] for row in (group, *members)} == {rate} and group["runs"] == "3"
        assert [row["seed"] for row in members] == ["1", "2", "10"] and group["seed"] == ""
        for metric in ("n2d_reverse/headline", "held_out/mine/ntp"):
            values = [float(row[metric]) for row in members]
            assert float(group[metric]) == pytest.approx(statistics.mean(values), rel=1e-5)
            assert float(group[f"{metric}/sd"]) == pytest.approx(statistics.stdev(values), abs=1e-5)
            assert float(group[f"{metric}/highest"]) == pytest.approx(max(values), rel=1e-5)
        assert float(group["n2d_reverse/headline/low"]) <= float(group["n2d_reverse/headline"])


def test_ungrouped_and_runs_without_repetitions_stand_alone_as_before(tmp_path):
    paths = [_run(tmp_path / f"s{seed}", {"n2d": 0.5}, f"seed={seed}") for seed in (1, 2)]
    alone = _said(paths, tmp_path / "out", ungrouped=True)
    assert (
        "Reversal tasks" in alone and "s2 minus s1, paired by prompt" in alone and "mean [95 %" not in alone
    )
    assert "group" not in (tmp_path / "out" / "comparison.csv").read_text().replace("name,group,", "")
    other = _run(tmp_path / "s3", {"n2d": 0.5}, "optimizer.lr=1e-5")
    assert "Reversal tasks" in _said([paths[0], other], tmp_path / "out")
    together = _said(paths, tmp_path / "out")
    assert "Reversal tasks" not in together and "mean [95 % interval]" in together
    assert "## Groups" not in (tmp_path / "out" / "comparison.md").read_text().split("## Every run")[1]


def test_a_report_of_a_folder_of_runs_is_of_all_of_them(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.9})
    assert [run.label for run in read_runs([sweep])] == [path.name for path in runs_in(sweep)]
    assert write_report([sweep]) == sweep / "report.html"


def test_equal_comparisons_write_equal_pictures(tmp_path):
    sweep = _sweep(tmp_path / "sweep", {0.3: 0.9})
    for output in ("one", "two"):
        _said([sweep], tmp_path / output, formats=("svg", "pdf"))
    for picture in ("scores.svg", "scores.pdf", "curves.svg", "curves.pdf"):
        assert (tmp_path / "one" / picture).read_bytes() == (tmp_path / "two" / picture).read_bytes()
