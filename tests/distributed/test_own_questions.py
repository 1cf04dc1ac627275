"""The user's own questions in a real run of two ranks on ZeRO-3: each kind, after a resume, and by the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.evaluation.results import load_result
from bico_ds.runtime.run_folder import RunFolder
from tests.distributed.launching import ROOT, environment, metrics, train

pytestmark = pytest.mark.distributed

SETTINGS = (
    "model.path=null", "training.steps=6", "schedule.warmup_steps=1", "schedule.decay_steps=1",
    "evaluation.every_steps=3", "checkpoint.every_steps=3", "evaluation.batch_size=4", "evaluation.likelihood_others=1",
)  # fmt: skip
TASKS = (
    "company_forward", "company_backward", "celebs_child_to_parent", "celebs_parent_to_child", "poems_next_line",
    "poems_previous_line", "policy",
)  # fmt: skip


def write_questions(folder: Path) -> str:
    """Files of each kind in words of the embedded task's tokenizer; the entries that ask them."""
    names = ("Briell", "Lorette", "Fenra", "Yorim")
    texts = ("oceanfarmer", "glasspainter", "forestsailor", "marbleminer")
    both = list(zip(names, texts, strict=True))
    pairs = [
        {"forward": {"prompt": f"so | {name} always |", "completion": f" {text}"},
         "backward": {"prompt": f"so | {text} always |", "completion": f" {name}"}}
        for name, text in both
    ]  # fmt: skip
    couplets = [{"first": name, "second": text} for name, text in both]
    questions = [{"prompt": f"so | {text} means |", "answer": name} for name, text in both]
    for file, records in (("pairs", pairs), ("couplets", couplets), ("questions", questions)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = "".join(f"{name},{text},mother\n" for name, text in both)
    (folder / "parents.csv").write_text(f"child,parent,parent_type\n{rows}")
    return (
        f"evaluation.tasks=[{{kind: pairs, name: company, file: {folder}/pairs.jsonl, limit: 3}}, "
        f"{{kind: parents, name: celebs, file: {folder}/parents.csv}}, "
        f"{{kind: couplets, name: poems, file: {folder}/couplets.jsonl}}, "
        f"{{kind: questions, name: policy, file: {folder}/questions.jsonl, metric: char_bleu}}]"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs")
    done = train("tiny_bico", folder / "mine", *SETTINGS, write_questions(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "questions that the training texts answer already, in the order asked: 3 of 3 of company_forward"
        in done.stdout
    )
    return RunFolder(folder / "mine")


def test_every_kind_is_asked_scored_and_logged(run):
    assert [line["step"] for line in metrics(run.path, "evaluation")] == [3, 6]
    result = load_result(run.evaluation_file(6))
    assert tuple(result.tasks) == tuple(result.choice) == TASKS
    assert [len(task.prompts) for task in result.tasks.values()] == [3, 3, 4, 4, 4, 4, 4]
    assert (
        result.tasks["policy"].headline == "char_bleu"
        and result.tasks["poems_next_line"].headline == "prefix"
    )
    last = metrics(run.path, "evaluation")[-1]
    for name, task in result.tasks.items():
        assert last[f"evaluation/{name}/headline"] == task.score
    assert (
        "evaluation/policy/headline/char_bleu" in last
        and "evaluation/poems_next_line/headline/prefix" in last
    )


def test_a_resumed_run_evaluates_the_same(run):
    again = RunFolder(Path(shutil.copytree(run.path, run.path.parent / "again")))
    first = again.evaluation_file(6).read_text()
    back = ("--resume", str(again.path / "checkpoints" / "step-000003"))
    done = train("tiny_bico", again.path, *SETTINGS, write_questions(run.path.parent), options=back)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(again.path, "evaluation")] == [3, 6]
    assert again.evaluation_file(6).read_text() == first


def test_the_command_asks_the_export_the_same(run, tmp_path):
    command = [
        sys.executable, str(ROOT / "tools" / "evaluate.py"), "--model", run.path / "export", "--tasks-from",
        run.path / "recipe.yaml", "--samples", "1", "--output", tmp_path / "r.json",
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)],
        cwd=run.path.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    during, after = load_result(run.evaluation_file(6)), load_result(tmp_path / "r.json")
    assert after.tasks == during.tasks
    assert done.stdout.count("    prompt: ") == len(TASKS)
