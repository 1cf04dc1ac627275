from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.comparison import View, _differences, _show, compare_runs, remarks
from bico_ds.evaluation.report.frontier import panels
from bico_ds.evaluation.report.paired import paired_differences
from bico_ds.evaluation.report.runs import load_runs, logged_headline
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.evaluation.scoring.metrics import METRICS, metrics_of
from bico_ds.evaluation.tasks.task import TASK_NAMES, load_tasks, task_file
from bico_ds.training.callbacks.tensorboard.tags import tagged
from bico_ds.training.evaluator import scalars
from tests import ROOT
from tests.damaged_files import damaged


def _run(folder: Path, scores: list[tuple[int, float]]) -> Path:
    folder.mkdir()
    lines: list[dict[str, object]] = [{"step": 1, "kind": "train", "loss": 2.0}]
    for step, score in scores:
        values = {f"evaluation/{t}/contains": score for t in ("n2d", "d2n", "n2d_reverse", "d2n_reverse")}
        lines.append(
            {
                "step": step,
                "kind": "evaluation",
                **values,
                "evaluation/n2d/headline": score,
                "evaluation/seconds": 1.0,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_step_evaluated_again_after_a_resume_counts_once_and_the_last_step_is_final(tmp_path):
    (run,) = load_runs([_run(tmp_path / "bico", [(100, 0.1), (200, 0.4), (200, 0.5), (300, 0.9)])])
    assert run.label == "bico"
    assert run.curves["n2d_reverse"] == [(100, 0.1), (200, 0.5), (300, 0.9)]
    assert run.final.tasks["d2n"].score == 0.9


def _save(task: TaskResult, path: Path) -> None:
    path.write_text(json.dumps(EvaluationResult(tasks={"n2d": task}).to_json()))


def test_the_result_file_of_a_run_wins_and_a_bare_result_can_be_compared_too(tmp_path):
    folder = _run(tmp_path / "ntp", [(100, 0.2)])
    result_file = folder / "evaluation" / "step-000100.json"
    result_file.parent.mkdir()
    task = TaskResult(
        headline="bleu", metrics={"bleu": 0.7}, intervals={"bleu": (0.6, 0.8)}, floors={"bleu": 0.1}
    )
    _save(task, result_file)
    runs = load_runs([folder, result_file])
    assert [run.final.tasks["n2d"].intervals["bleu"] for run in runs] == [(0.6, 0.8)] * 2
    assert [bool(run.curves) for run in runs] == [True, False]


@pytest.mark.parametrize("answer", [" two words", " a description of six whole words"])
def test_the_lines_of_every_task_that_training_asks_tell_its_headline(tmp_path, answer):
    for name in TASK_NAMES:
        task_file(tmp_path, name).write_text(json.dumps({"prompt": "who?", "completion": answer}) + "\n")
    for task in load_tasks(tmp_path, TASK_NAMES):
        assert logged_headline(metrics_of(task)) == task.headline


@pytest.mark.parametrize("names", [("contains", "prefix", "exact"), tuple(METRICS)])
def test_a_line_of_metrics_tells_whichever_headline_the_user_chose(tmp_path, names):
    rng = np.random.default_rng()
    for headline in names:
        metrics = {name: float(rng.choice([0.0, 0.5, rng.random()])) for name in names}
        task = TaskResult(headline=headline, metrics=metrics, intervals={headline: (0.0, 1.0)})
        numbers = scalars(EvaluationResult(tasks={"mine": task}))
        folder = tmp_path / headline
        folder.mkdir()
        line = {"step": 3, "kind": "evaluation", **numbers}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (run,) = load_runs([folder])
        assert run.final.tasks == {"mine": replace(task, intervals=run.final.tasks["mine"].intervals)}
        assert run.curves["mine"] == [(3, metrics[headline])] and run.bands["mine"][0][0] == 3
        shown = {tag for tag in tagged("evaluation", numbers) if headline in tag}
        assert not shown - {f"8 details/evaluation/mine/char_{headline}"}, "once, as the headline"
        assert tagged("evaluation", numbers)["1 reversal/mine"] == metrics[headline]


def test_runs_of_one_name_are_called_by_what_differs_in_their_paths(tmp_path):
    paths = [tmp_path / "x" / name / "tiny" for name in ("seed-1", "seed-2/again")]
    for path in paths:
        path.parent.mkdir(parents=True)
        _run(path, [(1, 0.5)])
    assert [run.label for run in load_runs(paths)] == ["seed-1/tiny", "seed-2/again/tiny"]
    assert [run.label for run in load_runs(paths[:1])] == ["tiny"]


def test_runs_without_an_evaluation_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no evaluation in metrics.jsonl"):
        load_runs([_run(tmp_path / "empty", [])])
    with pytest.raises(UserError, match="no such run folder"):
        load_runs([tmp_path / "nowhere"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"half')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not valid JSON"):
        load_runs([tmp_path / "broken"])


def test_evaluations_of_texts_alone_are_refused_as_such(tmp_path):
    record = {"step": 2, "kind": "evaluation", "evaluation/text/prose/perplexity": 9.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"only texts were evaluated, no reversal task"):
        load_runs([tmp_path])
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"model": "m", "weights": "w", "retention": {}}))
    with pytest.raises(UserError, match=r"^\S+result.json: this evaluation asked no reversal task"):
        load_runs([result])


def test_runs_that_were_asked_different_questions_do_not_stand_side_by_side(tmp_path):
    for name, metric in (("a", "bleu"), ("b", "contains")):
        task = TaskResult(headline=metric, metrics={metric: 0.7})
        _save(task, tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="'n2d' is scored by bleu in a and by contains in b"):
        compare_runs([tmp_path / "a.json", tmp_path / "b.json"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _result(path: Path, scores: list[float], *, persons: str = "aabbcc", new_tokens: int = 9) -> Path:
    prompts = [
        {"prompt": f"q{i}", "answer": " x", "group": person, "contains": score}
        for i, (person, score) in enumerate(zip(persons, scores, strict=True))
    ]
    task = TaskResult(
        headline="contains",
        metrics={"contains": sum(scores) / len(scores)},
        prompts=prompts,
        new_tokens=new_tokens,
    )
    _save(task, path)
    return path


def test_paired_differences_and_their_interval_by_hand(tmp_path):
    runs = [
        _result(tmp_path / "ntp.json", [0, 0, 0, 0, 1, 1]),
        _result(tmp_path / "bico.json", [1, 1, 0, 1, 0, 1]),
    ]
    out = io.StringIO()
    compare_runs(runs, output=tmp_path / "out", console=Console(file=out, width=80))
    # Differences a +1 +1, b 0 +1, c -1 0: the mean is 2 / 6. One resample of 27 is c, c, c (-0.5), one a, a, a
    # (+1): each more than the 2.5 % that an interval leaves out at an end.
    assert "+0.333 [-0.500, +1.000]" in out.getvalue()
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| n2d | contains | +0.333 [-0.500, +1.000] | 6 | 3 |" in page
    assert "bico minus ntp" in page
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert figures["bico"]["minus"]["ntp"]["n2d"]["contains"]["mean"] == pytest.approx(1 / 3)


def test_the_interval_of_a_paired_difference_agrees_with_scipys_bootstrap_over_persons():
    draw = np.random.default_rng(4)
    level, gain = draw.normal(size=(30, 1)), draw.normal(size=(30, 1))
    scores = [level + draw.normal(size=(30, 10)) for _ in range(2)]
    scores[1] += gain
    results = [
        TaskResult(
            headline="contains",
            metrics={"contains": values.mean()},
            prompts=[
                {"prompt": str(i), "answer": "", "group": str(i // 10), "contains": value}
                for i, value in enumerate(values.ravel())
            ],
        )
        for values in scores
    ]
    found = paired_differences(*results)["contains"]
    per_person = (scores[1] - scores[0]).mean(axis=1)
    reference = stats.bootstrap(
        (per_person,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean == pytest.approx(per_person.mean())
    assert found.interval == pytest.approx(tuple(reference), abs=0.03)


def test_other_prompts_and_other_lengths_are_reported_and_never_paired(tmp_path):
    runs = [
        _result(tmp_path / "a.json", [0, 1, 1, 1, 0, 0]),
        _result(tmp_path / "b.json", [0, 1, 1], persons="abc", new_tokens=40),
    ]
    out = io.StringIO()
    compare_runs(runs, output=tmp_path / "out", console=Console(file=out, width=200))
    assert "n2d: not the same prompts (6 in a, 3 in b)" in out.getvalue()
    assert "n2d: up to 9 new tokens in a, 40 in b" in out.getvalue()
    assert "6 / 3" in out.getvalue()
    assert "minus" not in out.getvalue()
    assert "not the same prompts" in (tmp_path / "out" / "comparison.md").read_text()


def test_held_out_losses_stand_side_by_side_are_sorted_by_and_told_where_they_do_not_compare(tmp_path):
    paths = [_result(tmp_path / f"{name}.json", [0, 1, 1, 1, 0, 0]) for name in ("first", "second")]
    losses = {"ntp": (3.25, 2.125, 0), "bico": (4.5, 4.75, 1)}
    for path, number in zip(paths, (0, 1), strict=True):
        found = {
            name: {
                "loss": values[number],
                "targets": 1200 + number,
                "identity": f"{name} {number * values[2]}",
            }
            for name, values in losses.items()
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": {"mine": found}}))
    first, second = load_runs(paths)
    assert (first.numbers["held_out/mine/ntp"], second.numbers["held_out/mine/ntp"]) == (3.25, 2.125)
    out = io.StringIO()
    view = View(sort="held_out/mine/ntp")
    compare_runs(paths, output=tmp_path / "out", view=view, console=Console(file=out, width=160))
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| mine | ntp | 2.1250 | 3.2500 | 1,201 / 1,200 |" in page, "the best first"
    assert "2.1250" in out.getvalue() and "Held-out loss" in out.getvalue()
    for shown in (page, out.getvalue()):
        assert (
            "held-out store mine, bico: other texts, or cut or masked otherwise, in second than in first"
            in shown
        )
        assert "held-out store mine, ntp: other" not in shown


def test_texts_beyond_ascii_that_other_rules_have_scored_are_reported(tmp_path):
    def result(name: str, prediction: str, **version: int) -> Path:
        prompt = {"prompt": "q", "answer": " x", "prediction": prediction, "group": "a", "contains": 1.0}
        task = TaskResult(headline="contains", metrics={"contains": 1.0}, prompts=[prompt], **version)
        _save(task, tmp_path / f"{name}.json")
        return tmp_path / f"{name}.json"

    def said(first: Path, second: Path) -> str:
        out = io.StringIO()
        compare_runs([first, second], output=tmp_path / "out", console=Console(file=out, width=200))
        return out.getvalue()

    old, new = result("old", " x"), result("new", " “x”", scoring=2)
    assert "n2d: scored by the rules of version 1 in old, 2 in new" in said(old, new)
    assert "scored by the rules" not in said(old, result("plain", " x y", scoring=2))
    assert "scored by the rules" not in said(new, result("newer", " é", scoring=2))


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1]", "expected a JSON object, found list"), ('{"kind": "evaluation"}', "not an evaluation")],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=f"metrics.jsonl:2: {message}"):
        load_runs([tmp_path])


def test_an_output_that_is_a_file_is_refused(tmp_path):
    run = _result(tmp_path / "a.json", [0.0] * 6)
    with pytest.raises(UserError, match=r"--output .*a.json: no folder can be made there"):
        compare_runs([run], output=run)


def test_the_command_writes_table_figures_and_picture(tmp_path):
    runs = [
        _run(tmp_path / name, [(100, 0.1), (200, final)]) for name, final in (("ntp", 0.0), ("bico", 0.9))
    ]
    command = [sys.executable, "tools/compare.py", *map(str, runs), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "n2d_reverse" in done.stdout
    assert "0.900" in done.stdout
    assert (
        "| n2d_reverse | description → name | contains | 0.000 | 0.900 | – |"
        in (tmp_path / "out" / "comparison.md").read_text()
    )
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["bico"]["curves"]["n2d"][1] == [
        200,
        0.9,
    ]
    for picture in ("scores.png", "curves.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([*command[:2], "nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nowhere: no such run")


def _work(folder: Path, step: int, *, flops: bool = True, **objectives: int) -> None:
    """A line of training at `step`, with the work of each objective so far, in steps of 7 rows, 10 tokens and 100 FLOPs."""
    parts = {"updates": 1, "rows": 7, "tokens": 10, "seconds": 0.5} | ({"flops": 100} if flops else {})
    work = {
        f"work/{what}/{name}": each * count
        for name, count in objectives.items()
        for what, each in parts.items()
    }
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": step, "kind": "train", **work}) + "\n")


def test_work_is_that_of_all_objectives_at_the_last_evaluation(tmp_path):
    ntp, bico = (_run(tmp_path / name, [(4, 0.1), (8, 0.4)]) for name in ("ntp", "bico"))
    for step in (4, 8, 9):  # the last is not evaluated
        _work(ntp, step, ntp=step)
        _work(bico, step, ntp=step // 2, bico=2 * step)
    out = io.StringIO()
    console = Console(file=out, width=200)
    compare_runs([ntp, bico, _run(tmp_path / "old", [(8, 0.2)])], output=tmp_path / "out", console=console)
    first, second, old = (run.work for run in load_runs([ntp, bico, tmp_path / "old"]))
    assert first == (8, 56, 80, 800, 4.0)
    assert second == (20, 140, 200, 2000, 10.0)
    assert old is None
    assert "| bico | 20 | 140 | 200 | 2e+03 | 2.500 | 10.0 |" in (tmp_path / "out/comparison.md").read_text()
    assert "| old | – | – | – | – | – | – |" in (tmp_path / "out/comparison.md").read_text()
    assert "beside the first" in out.getvalue()
    values = json.loads((tmp_path / "out/comparison.json").read_text())
    assert values["bico"]["work"]["flops"] == 2000 and "work" not in values["old"]


def test_runs_without_work_have_no_table_of_it_and_one_without_flops_no_ratio(tmp_path):
    old = [_run(tmp_path / name, [(8, 0.2)]) for name in ("a", "b")]
    out = io.StringIO()
    compare_runs(old, output=tmp_path / "out", console=Console(file=out, width=200))
    assert "The work of each run" not in out.getvalue()
    _work(old[0], 8, flops=False, ntp=8)
    _work(old[1], 8, ntp=8)
    compare_runs(old, output=tmp_path / "out", console=Console(file=out, width=200))
    assert "| a | 8 | 56 | 80 | – | – | 4.0 |" in (tmp_path / "out/comparison.md").read_text()
    assert "| b | 8 | 56 | 80 | 800 | – | 4.0 |" in (tmp_path / "out/comparison.md").read_text()


def test_any_damage_of_a_result_file_is_a_user_error_or_a_comparison(tmp_path):
    """Whatever is of another type is found where the file is read, not by the table or the plot that meets it."""
    whole = _result(tmp_path / "ntp.json", [0, 0, 0, 0, 1, 1])
    values = json.loads(whole.read_text())
    values["tasks"]["n2d"] |= {"intervals": {"contains": [0.0, 1.0]}, "floors": {"contains": 0.1}}
    values["texts"] = {"prose": {"perplexity": 9.0, "times": 2.0}}
    scores = {"metrics": {"contains": 0.5}, "intervals": {"contains": [0.0, 1.0]}, "prompts": 6}
    values["training_texts"] = {"n2d": {"scores": {"same": scores}, "rows": []}}
    values["held_out"] = {"mine": {"ntp": {"loss": 2.5, "targets": 1000, "identity": "a"}}}
    whole.write_text(json.dumps(values))
    bico = tmp_path / "bico.json"
    console = Console(file=io.StringIO(), width=80)
    for content in damaged(whole.read_bytes(), count=60):
        bico.write_bytes(content)
        with contextlib.suppress(UserError):
            runs = load_runs([whole, bico])
            _show(runs, {}, panels(runs), console)
            list(remarks(runs))
            _differences(*runs)


@pytest.mark.parametrize("wrong", ['"x"', "[1]", "1e999", "null", "{}"])
def test_a_line_of_metrics_with_values_of_other_types_is_named_or_does_without_them(tmp_path, wrong):
    folder = _run(tmp_path / "a", [(100, 0.2)])
    kept = folder / "metrics.jsonl"
    before = kept.read_text()
    kept.write_text(before + f'{{"step": 100, "kind": "train", "work/seconds/ntp": {wrong}}}\n')
    (run,) = load_runs([folder])
    assert run.work is None
    for key in ("step", "evaluation/n2d/contains"):
        kept.write_text(
            before + json.dumps({"step": 5, "kind": "evaluation"})[:-1] + f', "{key}": {wrong}}}\n'
        )
        if key == "step" or wrong != "1e999":
            with pytest.raises(UserError, match=r"metrics.jsonl:3: not an evaluation as a run writes it"):
                load_runs([folder])
    kept.write_text(before + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:3: not valid JSON"):
        load_runs([folder])


def test_names_in_square_brackets_are_names_and_no_markup(tmp_path):
    runs = [_run(tmp_path / name, [(100, 0.2)]) for name in ("a[red]", "b[nope")]
    out = io.StringIO()
    compare_runs(runs, output=tmp_path / "[out]", console=Console(file=out, width=120))
    assert "a[red]" in out.getvalue() and "b[nope" in out.getvalue() and "[out]" in out.getvalue()
