"""The report: what it says of runs, where it is written, and that a stranger's files harm neither it nor its reader."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bico_ds.commands.show.report import main
from bico_ds.commands.train import main as train_command
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.evaluation.report.page.write import write_report
from bico_ds.evaluation.results import EvaluationResult
from tests.damaged_files import damaged
from tests.evaluation.report.page.run_folders import (
    PERSONS,
    SECONDS_PER_STEP,
    STARTED,
    run_folder,
    scores_of,
    task_result,
)


def text_of(page: Path) -> str:
    """What a reader sees, blanks as one."""
    html = page.read_text(encoding="utf-8")
    body = html.partition("<body>")[2]
    text = re.sub(r"<[^>]+>", " ", body)
    return re.sub(r"\s+([.,;:)])", r"\1", re.sub(r"\s+", " ", text))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """A run that answers in reverse, and one that does not."""
    runs = tmp_path_factory.mktemp("runs")
    bico = run_folder(runs / "tiny_bico", scores_of(0.9), prediction="it is {}<script>alert(1)</script>")
    ntp = run_folder(
        runs / "tiny_ntp", scores_of(0.0), recipe="tiny_ntp", texts={"prose": [13.0, 20.0, 31.0]}
    )
    return bico, ntp


@pytest.fixture(scope="module")
def page(two) -> Path:
    return write_report(two)


def test_the_answer_is_said_with_intervals_over_persons(two, page):
    task = EvaluationResult.from_json(json.loads((two[0] / "evaluation" / "step-000300.json").read_text()))
    low, high = task.tasks["n2d_reverse"].intervals["contains"]
    # All of 20 persons wrong: were the true share p, that would happen with the chance (1 - p)^20, which is 2.5 % here.
    end = 1 - 0.025 ** (1 / PERSONS)
    assert (
        f"Asked the other way round, tiny_bico answers 90 % ({100 * low:.0f} to {100 * high:.0f}) of 80 questions and "
        f"tiny_ntp 0 % (0 to {100 * end:.0f})."
    ) in text_of(page)


def test_every_section_is_there_with_its_figures(page):
    text = text_of(page)
    for said in (
        "How it was learnt", "Every task", "Sample answers", "What is left of the other language",
        "Losses by objective", "Settings that differ", "Speed, memory and work", "What happened", "Run it again",
    ):  # fmt: skip
        assert said in text, said
    assert "step of bico 0.107 s 16 ms to 22 ms 5.6 times" in text
    assert "prose tiny_ntp 300 31 12 2.58" in text
    assert "checkpoint 300 2026-09-21 14:15:49 held training up for 0.25 s" in text
    assert "start 1 – 2026-09-21 14:13:20 2 ranks on node7" in text
    assert "torch 2.13.0" in text and "c0ffee" * 6 in text
    assert "peak memory of tensors (on a CPU: growth of the process) 1.5 GB 1.5 GB" in text


def test_only_keys_that_differ_are_listed(page):
    table = re.search(r"Keys that differ.*?</table>", page.read_text(), re.DOTALL)
    assert table is not None
    keys = re.findall(r"<code>([\w.]+)</code>", table[0])
    assert {"name", "objectives.bico.mask.rate", "objectives.ntp.probability"} <= set(keys)
    assert not {"optimizer.lr", "training.steps", "model.config.hidden_size"} & set(keys)


def test_samples_are_right_and_wrong_ones_of_each_run_and_nothing_of_them_is_markup(page):
    html = page.read_text(encoding="utf-8")
    cards = html.partition('id="answers"')[2].partition("</section>")[0].split('<p class="asked')[1:]
    seen = {
        (task, run, mark)
        for task, part in enumerate(
            html.partition('id="answers"')[2].partition("</section>")[0].split("<h3>")[1:]
        )
        for mark, run in re.findall(r'aria-label="(right|wrong)">.</span><span class="who">(\w+)<', part)
    }
    assert {(0, "tiny_bico", "right"), (0, "tiny_bico", "wrong"), (0, "tiny_ntp", "wrong")} <= seen
    assert {(2, "tiny_bico", "right"), (2, "tiny_ntp", "right")} <= seen
    assert 8 <= len(cards) <= 24
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html


def test_the_commands_that_repeat_a_run_are_taken_and_mean_its_recipe(two, page):
    commands = re.findall(r"deepspeed [^\n<]+", page.read_text())
    assert len(commands) == 2
    for run, command in zip(two, commands, strict=True):
        words = shlex.split(command.partition("launch/train.py")[2])
        options = train_command.parse(words)
        assert load_recipe(options.recipe, []) == load_recipe(str(run / "recipe.yaml"), [])
        assert options.output_dir != run
    assert "launch/train.py --recipe tiny_bico --set &#x27;description=two words&#x27;" in page.read_text()


def test_a_run_without_a_reversal_question_is_reported_with_its_losses(tmp_path):
    said = text_of(write_report([run_folder(tmp_path / "base", recipe="tiny_base")]))
    assert "No question was asked the other way round." in said
    assert re.search(r"base: the loss went from [\d.]+ at step 1 to [\d.]+ at step 300", said)
    assert "Losses by objective" in said and "Every task" not in said and "Sample answers" not in said


def test_held_out_losses_have_a_curve_and_the_last_ones_a_table_also_of_a_result_file(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5))
    # Step 200 was done again after a resume.
    found = [(0, 5.5), (100, 4.25), (200, 9.75), (200, 3.5), (300, 3.625)]
    lines = [
        {"step": step, "kind": "evaluation", "evaluation/held_out/mine/ntp": loss,
         "evaluation/held_out/mine/bico": bad, "evaluation/held_out/mine/once": 2.25 if step == 300 else None}
        for (step, loss), bad in zip(found, (6.0, 1e300, "x", 1e999, 5.25), strict=True)
    ]  # fmt: skip
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(json.dumps(line) + "\n" for line in lines)
    losses = {"mine": {"ntp": {"loss": 2.875, "targets": 9, "identity": "x"}}}
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"model": "b", "weights": "w", "identities": {}, "held_out": losses}))
    html = write_report([run, file]).read_text(encoding="utf-8")
    part = html.partition('id="held-out"')[2].partition("</section>")[0]
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))
    assert re.findall(r"<h3>(.*?)</h3>", part) == ["ntp, on mine", "bico, on mine"], (
        "of one step there is no curve"
    )
    assert (
        "a: 5.5000 at step 0, 3.6250 at step 300." in said
        and "a: 6.0000 at step 0, 5.2500 at step 300." in said
    )
    assert "0 5.5000 100 4.2500 200 3.5000 300 3.6250" in said and "9.75" not in said
    assert "mine/ntp 3.6250 2.8750 mine/bico 5.2500 – mine/once 2.2500 –" in said
    assert 'href="#held-out"' in html


def test_a_run_that_failed_says_so_at_once(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5))
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(
        json.dumps(state | {"state": "failed", "reason": "NCCL <timeout>", "step": 120})
    )
    said = text_of(write_report([run]))
    assert (
        "a is not done: failed at step 120 (NCCL &lt;timeout&gt;)." in said.partition("How it was learnt")[0]
    )
    assert "failed 120" in said.partition("What happened")[2]


def test_events_of_a_resumed_run_stand_in_their_order_with_the_times_that_files_have(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5), steps=(100, 200, 300))
    (first,) = json.loads((run / "run.json").read_text())
    again = first | {"run_id": "def", "time": "2026-09-21T14:14:50+0000"}  # 90 s later: 180 steps
    (run / "run.json").write_text(json.dumps([first, again]))
    for step in (100, 200, 300):
        file = run / "evaluation" / f"step-{step:06d}.json"
        file.touch()
        # The last one was copied later, and its time tells nothing.
        written = STARTED + step * SECONDS_PER_STEP if step < 300 else STARTED + 10**6
        os.utime(file, (written, written))
    (run / "logs").mkdir()
    (run / "logs" / "nonfinite-step-000150-rank-1.json").write_text("[]")
    said = text_of(write_report([run])).partition("What happened")[2].partition("Run it again")[0]
    found = re.findall(
        r"(start \d|evaluation \d+|not finite 150|checkpoint|done 300) (?:– )?([\d-]+ [\d:]+)?", said
    )
    assert [what for what, _ in found] == [
        "start 1", "evaluation 100", "not finite 150", "start 2", "evaluation 200", "checkpoint", "evaluation 300",
        "done 300",
    ]  # fmt: skip
    times = dict(found)
    assert times["evaluation 200"] == "2026-09-21 14:15:00" and times["evaluation 300"] == ""


def test_a_task_scored_by_bleu_is_no_per_cent_of_questions(tmp_path):
    task = task_result([True] * 30 + [False] * 50, metric="bleu")
    values = EvaluationResult(tasks={"d2n_reverse": task, "of my own": task}).to_json() | {
        "model": "m",
        "weights": "w",
    }
    (tmp_path / "a.json").write_text(json.dumps(values))
    said = text_of(write_report([tmp_path / "a.json"]))
    low, high = task.intervals["bleu"]
    assert f"a reaches a word BLEU of 0.375 ({low:.2f} to {high:.2f}) over 80 questions." in said
    assert "of my own bleu 0.375" in said and "bleu: word BLEU:" in said


def test_of_many_runs_the_best_and_the_worst_are_said_and_all_stand_in_the_table(tmp_path):
    scores = np.random.default_rng().permutation(12) / 20
    runs = [
        run_folder(tmp_path / f"run{n}", {"n2d_reverse": score}, logged=3) for n, score in enumerate(scores)
    ]
    said = text_of(write_report(runs))
    assert f"run{scores.argmax()} answers 55 %" in said and f"the worst, run{scores.argmin()} 0 %" in said
    rows = said.partition("Every task")[2].partition("another person's answer")[0]
    assert [f"run{n} {100 * score:.0f} %" in rows for n, score in enumerate(scores)] == [True] * 12


def test_of_many_runs_that_score_the_same_none_is_the_best(tmp_path):
    runs = [run_folder(tmp_path / f"run{n}", {"n2d_reverse": 0.5}, logged=3) for n in range(4)]
    said = text_of(write_report(runs))
    assert "and so do all 4 runs" in said and "the best of" not in said


def test_a_name_that_reorders_text_leaves_the_words_after_it_in_their_order(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.9), logged=3).rename(tmp_path / "a\u202eb")
    page = write_report([run])
    assert "a b answers 90 %" in text_of(page) and "\u202e" not in page.read_text(encoding="utf-8")


def test_a_name_that_begins_like_an_option_is_named_as_a_path(tmp_path, monkeypatch):
    run_folder(tmp_path / "run", scores_of(0.9), logged=3).rename(tmp_path / "-run")
    monkeypatch.chdir(tmp_path)
    page = unescape(write_report([Path("-run")]).read_text())
    words = shlex.split(re.search(r"launch/train.py ([^<]+)<", page)[1])
    assert str(train_command.parse(words).output_dir) == "-run-again"
    words = shlex.split(re.search(r"bico-ds report ([^<]+)<", page)[1])
    assert main.parse(words).runs == [Path("-run")]


def test_a_run_named_by_a_dot_is_repeated_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(run_folder(tmp_path / "run", scores_of(0.9), logged=3))
    page = unescape(write_report([Path(".")]).read_text())
    words = shlex.split(re.search(r"launch/train.py ([^<]+)<", page)[1])
    assert train_command.parse(words).output_dir == tmp_path / "run-again"


def test_of_tasks_without_words_it_is_not_said_that_none_is_the_other_way_round(tmp_path):
    tasks = {"child_to_parent": task_result([True] * 80), "parent_to_child": task_result([False] * 80)}
    values = EvaluationResult(tasks=tasks).to_json() | {"model": "models/x", "weights": "w"}
    (tmp_path / "a.json").write_text(json.dumps(values))
    said = text_of(write_report([tmp_path / "a.json"]))
    assert "No name–description question was asked the other way round." in said
    assert "parent → child: a answers 0 %" in said


def test_result_files_make_a_report_beside_them(tmp_path):
    tasks = {"n2d_reverse": task_result([True] * 30 + [False] * 50)}
    for name in ("a", "b"):
        values = EvaluationResult(tasks=tasks).to_json() | {"model": "models/x", "weights": "w"}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    written = write_report([tmp_path / "a.json", tmp_path / "b.json"])
    assert written == tmp_path / "report.html"
    assert "a answers 38 %" in text_of(written) and "models/x" in text_of(written)


def test_runs_that_were_asked_other_numbers_of_questions_each_say_theirs(tmp_path):
    for name, right, wrong in (("a", 30, 50), ("b", 10, 30)):
        tasks = {"n2d_reverse": task_result([True] * right + [False] * wrong)}
        values = EvaluationResult(tasks=tasks).to_json() | {"model": "models/x", "weights": "w"}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    said = text_of(write_report([tmp_path / "a.json", tmp_path / "b.json"]))
    assert re.search(r"a answers 38 % \([^)]+\) of 80 questions and b 25 % \([^)]+\) of 40 questions", said)


def test_what_is_no_report_is_never_overwritten(two, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine")
    assert main([str(two[0]), "--output", str(mine)]) == 2
    assert "is there already and no report; name another file" in capsys.readouterr().err
    assert mine.read_text() == "<html>mine"
    assert main([str(two[0]), "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    new = tmp_path / "not" / "there" / "report.html"
    for _ in range(2):  # the second replaces the first
        assert main([str(two[0]), "--output", str(new)]) == 0
        assert capsys.readouterr().out == f"written: {new}\n"
    assert [path.name for path in new.parent.iterdir()] == ["report.html"]


def test_what_is_no_run_is_refused(two, tmp_path):
    with pytest.raises(UserError, match="no such run folder or result file"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no run folder, it has none of recipe.yaml"):
        write_report([tmp_path])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a result of bico-ds evaluate"):
        write_report([tmp_path / "x.json"])
    with pytest.raises(UserError, match="named twice"):
        write_report([two[0], two[0]])
    with pytest.raises(UserError, match="named twice"):
        write_report([two[0], two[0].parent / "x" / ".." / two[0].name])
    assert not (tmp_path / "report.html").exists()


def test_secrets_of_recipes_command_lines_and_reasons_are_left_out(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5))
    secret = "hf_" + "A1b2C3d4" * 4
    recipe = (run / "recipe.yaml").read_text().replace("description: ", f"description: {secret} ")
    (run / "recipe.yaml").write_text(recipe)
    starts = json.loads((run / "run.json").read_text())
    starts[0]["command"] += ["--api-key", "s3cr3t-value", secret]
    (run / "run.json").write_text(json.dumps(starts))
    state = json.loads((run / "state.json").read_text())
    reason = f"refused: Authorization: Bearer {secret}"
    (run / "state.json").write_text(json.dumps(state | {"state": "failed", "reason": reason}))
    html = write_report([run]).read_text()
    assert secret not in html and "s3cr3t-value" not in html and "(not recorded)" in html


def test_broken_files_cost_their_section_alone_and_are_named(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5))
    (run / "run.json").write_text('[{"run_id"')
    (run / "recipe.yaml").write_text("training: [")
    (run / "evaluation" / "step-000300.json").write_text('{"tasks": ')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('garbage\n{"step": "x"}\n')
        file.write('{"step": 200, "kind": "evaluation", "evaluation/n2d/contains": "oops"}\n{"half')
    said = text_of(write_report([run]))
    faults = said.partition("Not all of a could be read:")[2].partition("Curves")[0]
    for name in (
        "metrics.jsonl: 2 damaged lines left out",
        "run.json: not valid JSON",
        "recipe.yaml:",
        "step-000300.json:",
    ):
        assert name in faults
    assert "a answers 50 %" in said and "Losses by objective" in said and "Settings" not in said
    assert said.partition("What happened")[2].count("evaluation 200") == 1


def test_any_damage_of_any_file_of_a_run_makes_a_report_or_one_message(tmp_path):
    run = run_folder(tmp_path / "a", scores_of(0.5), steps=(2, 4), logged=4, texts={"prose": [13.0, 20.0]})
    (run / "recipe.yaml").write_text("training: {steps: 4}\nobjectives: [{kind: ntp}, {kind: bico}]\n")
    (run / "slurm").mkdir()
    attempt = {"job": "1", "restarts": 0, "step": 2, "run_id": None, "time": 1.0}
    (run / "slurm" / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for number, (path, before) in enumerate(kept.items()):
        *lines, last = before.splitlines(keepends=True)
        earlier = b"".join(lines) if path.suffix == ".jsonl" else b""
        for content in [*damaged(last if earlier else before, count=4)][number % 2 :: 2]:
            path.write_bytes(earlier + content + b"\n")
            try:
                written = write_report([run], tmp_path / "r.html")
            except UserError as error:
                assert path.name in str(error) or "scored by" in str(error), (path, content[:200])  # noqa: PT017
            else:
                assert written.read_text(encoding="utf-8").endswith("</html>\n")
        path.write_bytes(before)
    shutil.rmtree(run)


class Page(HTMLParser):
    """The elements of a page in their order, with their attributes and the open ones around them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self._open)))
        self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self._open)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def of(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes, _ in self.found if tag in tags]


def test_the_page_can_be_read_without_eyes_and_asks_for_nothing(page):
    html = Page(page.read_text(encoding="utf-8"))
    (root,) = html.of("html")
    assert root["lang"] == "en"
    levels = [int(tag[1]) for tag, _, _ in html.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(cell.get("scope") in ("col", "row") for cell in html.of("th"))
    assert len(html.of("caption")) == len(html.of("table")) > 8
    pictures = [x for x in html.of("svg") if x.get("aria-hidden") != "true"]
    names = {x["id"] for x in html.of("title", "desc") if "id" in x}
    assert len(pictures) >= 9
    assert all(x["role"] == "img" and set(x["aria-labelledby"].split()) <= names for x in pictures)
    ids = [attributes["id"] for _, attributes, _ in html.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(x["href"][1:] in ids and x["href"][0] == "#" for x in html.of("a"))
    assert not html.of("script", "link", "img", "iframe", "object", "use", "image")
    assert not [x for _, x, _ in html.found if {"src", "srcset", "style", "onclick", "onload"} & set(x)]
    assert (
        "http" not in page.read_text()
        and "url(" not in page.read_text()
        and "@import" not in page.read_text()
    )


def test_two_runs_with_thousands_of_lines_make_a_small_page(tmp_path):
    runs = [run_folder(tmp_path / name, scores_of(0.5), logged=2000, steps=(1000, 2000)) for name in "ab"]
    written = write_report(runs)
    assert written.stat().st_size < 300_000
    assert "Each point is the mean of 10 logged values." in text_of(written)
