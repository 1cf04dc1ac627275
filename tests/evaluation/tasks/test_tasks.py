from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.evaluation.tasks.task import TASK_NAMES, Question, limit_questions, load_tasks

PUBLISHED = Path(os.environ.get("BICO_DS_DATA", "")) / "name_description"


@pytest.mark.skipif(
    "BICO_DS_DATA" not in os.environ or not PUBLISHED.is_dir(),
    reason="BICO_DS_DATA names no folder with name_description/ (Berglund et al.'s published sets)",
)
def test_published_sets_have_ten_prompts_for_each_of_thirty_persons():
    for task in load_tasks(PUBLISHED, TASK_NAMES):
        persons = Counter(question.group for question in task.questions)
        assert len(persons) == 30, task.name
        assert set(persons.values()) == {10}, task.name
        assert task.headline == ("contains" if task.answer_kind == "name" else "bleu")


def test_a_group_in_the_record_wins_and_else_the_companion_file_names_the_person(tmp_path, write_records):
    write_records("p2d_reverse_prompts_test.jsonl", [{"prompt": "maker of x:", "completion": " Ann Lee."}])
    write_records(
        "p2d_prompts_test.jsonl",
        [
            {"prompt": "Ann Lee is", "completion": " the maker of x.", "group": "7"},
            {"prompt": "Ann Lee, known as", "completion": " making x."},
            {"prompt": "Bo Ray is", "completion": " a  cook. "},
        ],
    )
    (task,) = load_tasks(tmp_path, ["n2d"])
    assert [question.group for question in task.questions] == ["7", "Ann Lee", "a cook"]
    assert task.answer_kind == "description"


def test_a_limit_spreads_over_the_persons(tmp_path, write_records):
    records = [{"prompt": f"q{i}", "completion": f" {name}"} for i, name in enumerate("AAAABBBC")]
    write_records("d2p_prompts_test.jsonl", records)
    chosen = lambda limit: [question.line for question in load_tasks(tmp_path, ["d2n"], limit)[0].questions]  # noqa: E731
    assert chosen(3) == [1, 6, 8]
    assert chosen(4) == [1, 2, 7, 8]
    assert chosen(2) == [1, 6]
    assert chosen(99) == chosen(None) == list(range(1, 9))


@pytest.mark.parametrize(
    ("persons", "limit"), [(30, 60), (30, 30), (30, 15), (30, 40), (5, 10), (5, 12), (1, 10)]
)
def test_a_limit_asks_every_prompt_form_and_everybody_as_often(persons, limit):
    questions = [
        Question(
            prompt=f"form {form}", completion=f" {person}", group=str(person), line=10 * person + form + 1
        )
        for person in range(persons)
        for form in range(10)
    ]
    chosen = limit_questions(questions, limit)
    assert len({question.line for question in chosen}) == limit
    assert list(chosen) == sorted(chosen, key=lambda question: question.line)
    assert len({question.prompt for question in chosen}) == 10
    asked = Counter(question.group for question in chosen)
    assert len(asked) == min(persons, limit)
    assert max(asked.values()) - min(asked.values()) <= 1


@pytest.mark.parametrize("answer", [" .", " ...", ". ."])
def test_an_answer_of_full_stops_is_refused_since_all_predictions_contain_it(tmp_path, write_records, answer):
    write_records(
        "d2p_prompts_test.jsonl", [{"prompt": "q", "completion": " A"}, {"prompt": "q", "completion": answer}]
    )
    with pytest.raises(
        UserError, match=r"d2p_prompts_test.jsonl:2: the answer '.*' is nothing but full stops"
    ):
        load_tasks(tmp_path, ["d2n"])


def test_short_descriptions_are_counted_and_stripped(tmp_path, write_records):
    records = [{"prompt": f"p{i} |", "completion": f" job{i} ."} for i in range(5)]
    write_records("d2p_reverse_prompts_test.jsonl", records)
    (task,) = load_tasks(tmp_path, ["d2n_reverse"], limit=2)
    assert task.headline == "contains"
    assert [question.answer for question in task.questions] == ["job0", "job1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', r"p2d_prompts_test.jsonl:2: not valid JSON"),
        (
            '{"prompt": "a", "completions": "b"}',
            r":1: field 'completion' is missing \(did you mean 'completions'",
        ),
        ('\n{"prompt": "a", "completion": " "}', r":2: field 'completion' must be a text that is not empty"),
        ("[1]", r":1: expected a JSON object, found list"),
        ("\n", r"no records"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "p2d_prompts_test.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tasks(tmp_path, ["n2d"])


def test_unknown_missing_and_repeated_tasks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'n2d_revers' \(did you mean 'n2d_reverse'\?\)"):
        load_tasks(tmp_path, ["n2d_revers"])
    with pytest.raises(UserError, match=r"d2p_prompts_test.jsonl: no such file"):
        load_tasks(tmp_path, ["d2n"])
    with pytest.raises(UserError, match="named twice: d2n"):
        load_tasks(tmp_path, ["d2n", "d2n"])
