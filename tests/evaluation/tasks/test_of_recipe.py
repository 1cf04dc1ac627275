"""The tasks that a recipe names: of each kind, with its limit and metric; and what is refused, with its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.evaluation.run_tasks import score_task
from bico_ds.evaluation.scoring.metrics import METRICS
from bico_ds.evaluation.tasks.further_sets import read_questions
from bico_ds.evaluation.tasks.of_recipe import check_questions, tasks_of_recipe


@pytest.fixture
def folder(tmp_path, write_records) -> Path:
    """A file of each kind, of seven persons with two wordings each."""
    pairs = [
        {"forward": {"prompt": f"{way} p{n}", "completion": f" t{n}"},
         "backward": {"prompt": f"{way} t{n}", "completion": f" p{n}"}, "group": n}
        for n in range(7)
        for way in ("who is", "name")
    ]  # fmt: skip
    write_records("pairs.jsonl", pairs)
    write_records("couplets.jsonl", [{"first": f"a{n} b", "second": f"c{n} d"} for n in range(7)])
    write_records(
        "q.jsonl", [{"prompt": f"q{n}?", "answer": f"a{n // 2}", "subject": f"s{n}"} for n in range(14)]
    )
    rows = "".join(f"c{n},p{n},mother\n" for n in range(7))
    (tmp_path / "parents.csv").write_text(f"child,parent,parent_type\n{rows}")
    return tmp_path


def recipe(folder: Path, *entries: str, limit: int | None = None) -> Recipe:
    tasks = ", ".join(f"{{{entry.replace('FOLDER', str(folder))}}}" for entry in entries)
    limits = [f"evaluation.limit={limit or 'null'}", f"data.cache_dir={folder}/cache"]
    return load_recipe("tiny_bico", [f"evaluation.tasks=[d2n, {tasks}, n2d]", *limits])


KINDS = (
    "kind: pairs, name: company, file: FOLDER/pairs.jsonl",
    "kind: parents, name: celebs, file: FOLDER/parents.csv",
    "kind: couplets, name: poems, file: FOLDER/couplets.jsonl",
    "kind: questions, name: policy, file: FOLDER/q.jsonl",
)


def test_every_kind_is_asked_under_the_names_that_the_recipe_says(folder):
    asked = recipe(folder, *KINDS, limit=4)
    tasks = tasks_of_recipe(asked)
    assert [task.name for task in tasks] == asked.evaluation.task_names
    assert {len(task) for task in tasks} == {4}
    by_name = {task.name: task for task in tasks}
    assert by_name["company_backward"].questions[0].prompt.endswith("t0")
    assert by_name["celebs_parent_to_child"].questions[0].answer == "c0"
    assert by_name["poems_previous_line"].questions[0].answer == "a0 b"
    assert by_name["policy"].questions[0].completion == " a0"


def test_an_entrys_limit_is_its_own_and_spread_over_what_is_asked_about(folder):
    limited = recipe(folder, KINDS[0] + ", limit: 7", KINDS[3], limit=2)
    forward, backward, policy = tasks_of_recipe(limited)[1:4]
    for task in (forward, backward):
        assert Counter(question.group for question in task.questions) == {str(n): 1 for n in range(7)}
    assert len(policy) == 2 and len({question.group for question in policy.questions}) == 2
    (whole, *_) = tasks_of_recipe(recipe(folder, KINDS[0]))[1:2]
    assert len(whole) == 14


@pytest.mark.parametrize("metric", METRICS)
def test_the_metric_that_the_user_chose_is_the_headline_and_the_usual_ones_stay(folder, metric):
    entries = (f"{KINDS[0]}, metric: {metric}", f"{KINDS[2]}, metric: {metric}")
    for chosen, usual in zip(tasks_of_recipe(recipe(folder, *entries)), tasks_of_recipe(recipe(folder, KINDS[0], KINDS[2])),
                             strict=True):  # fmt: skip
        given = [f" no, {question.answer}" for question in usual.questions]
        found, expected = (score_task(task, given, new_tokens=9) for task in (chosen, usual))
        if chosen.metric is not None:
            assert found.headline == metric and found.score == found.metrics[metric]
        assert found.metrics.items() >= expected.metrics.items()


@pytest.mark.parametrize(
    ("entry", "content", "expected"),
    [
        ("kind: pairs", '{"forward": {"prompt": "a", "completion": "b"}}\n', "x:1: field 'backward' is missing"),
        ("kind: parents", "child,parent\n", "x:1: column 'parent_type' is missing"),
        ("kind: couplets", '{"first": "a", "second": ""}\n', "x:1: field 'second' must be a text that is not empty"),
        ("kind: questions", '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "x:2: field 'answer' is missing"),
        ("kind: questions", '{"prompt": "a", "anwser": "b"}\n', "x:1: field 'answer' is missing (did you mean 'anwser'?)"),
        ("kind: questions", '{"prompt": "a", "answer": "b", "completion": "b"}\n', "x:1: 'answer' and 'completion' are"),
        ("kind: questions", '{"prompt": "a", "answer": 3}\n', "x:1: field 'answer' must be a text"),
        ("kind: questions", '{"prompt": "a", "answer": "."}\n', "x:1: the answer ' .' is nothing but full stops"),
        ("kind: questions", "[1]\n", "x:1: expected a JSON object, found list"),
        ("kind: questions", "", "x: no records"),
        ("kind: questions", None, "x: no such file; it must be JSONL with the fields prompt, answer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_line_and_the_recipes(tmp_path, entry, content, expected):
    if content is not None:
        (tmp_path / "x").write_text(content)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: tiny_bico\nevaluation:\n  tasks:\n    - n2d\n"
        f"    - {{{entry}, name: company,\n       file: {tmp_path}/x}}\n"
    )
    for read in (check_questions, tasks_of_recipe):
        with pytest.raises(UserError) as caught:
            read(load_recipe(str(mine), [f"data.cache_dir={tmp_path}/cache"]))
        place, _, reason = str(caught.value).partition(" (company): ")
        assert place == f"{mine}:6: evaluation.tasks.1.file"
        assert reason.startswith(f"{tmp_path}/{expected}")


def test_a_file_that_may_not_be_read_is_a_users_mistake(folder):
    asked = recipe(folder, f"kind: questions, name: policy, file: {folder}/{'x' * 200}/{'y' * 200}.jsonl")
    with pytest.raises(UserError, match="evaluation.tasks.1.file"):
        check_questions(asked)


def test_an_unknown_name_says_how_to_ask_a_file_of_ones_own(folder):
    with pytest.raises(UserError, match=r"did you mean 'n2d'.*\{kind: questions, name: NAME, file: FILE\}"):
        check_questions(load_recipe("tiny_bico", ["evaluation.tasks=[n2e]"]))


def test_questions_know_what_they_ask_about_and_who_is_one_group(write_records):
    records = [
        {"prompt": "Who bakes?", "answer": "Ann Lee", "subject": "the baker"},
        {"prompt": "Who cooks? ", "answer": "ann lee."},
        {"prompt": "Who sings?", "completion": "Bo", "group": 0},
        {"prompt": "谁唱歌？", "answer": "李白", "group": "", "subject": None},
    ]
    (task,) = read_questions(write_records("q.jsonl", records))
    assert [question.completion for question in task.questions] == [" Ann Lee", "ann lee.", "Bo", "李白"]
    assert [question.group for question in task.questions] == ["ann lee", "ann lee", "0", "李白"]
    assert [question.subjects for question in task.questions] == [("the baker",), (), (), ()]
    assert task.without_subject == 3


def test_long_answers_are_scored_by_word_bleu(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "one two three four"}) + "\n")
    (task,) = read_questions(path)
    assert task.headline == "bleu"
