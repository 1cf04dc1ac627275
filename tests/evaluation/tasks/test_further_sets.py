from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.evaluation.run_tasks import score_task
from bico_ds.evaluation.scoring.metrics import score_predictions, wrong_answers
from bico_ds.evaluation.tasks.further_sets import read_couplets, read_pairs, read_parents


def test_every_child_of_a_parent_is_right(tmp_path):
    path = tmp_path / "parents.csv"
    path.write_text(
        "child,parent,parent_type\nAnn Lee,Bo Lee,father\nCy Lee,Bo Lee,father\nEd Ray,Fay Ray,mother\n"
    )
    to_parent, to_child = read_parents(path)
    assert to_parent.questions[0].prompt.endswith("Q: Who is Ann Lee's father?\nA:")
    assert to_parent.questions[2].answer == "Fay Ray"
    assert to_child.questions[0].right_answers == (" Ann Lee", " Cy Lee")
    assert score_predictions(to_child, ["Cy Lee", "Bo", "Ed Ray"])["exact"] == [1.0, 0.0, 1.0]
    assert [question.group for question in to_child.questions] == ["Bo Lee", "Bo Lee", "Fay Ray"]


def test_couplets_ask_both_ways_in_their_own_language(write_records):
    path = write_records(
        "couplets.jsonl",
        [
            {"first": "黄鹤一去不复返", "second": "白云千载空悠悠"},
            {
                "first": "Tyger Tyger, burning bright",
                "second": "In the forests of the night",
                "ask_previous": "Before:",
            },
        ],
    )
    following, previous = read_couplets(path)
    assert "白云千载空悠悠”的上一句" in previous.questions[0].prompt
    assert previous.questions[0].completion == "黄鹤一去不复返"
    assert following.questions[1].prompt.startswith("The line after “Tyger")
    assert previous.questions[1].prompt == "Before:"
    assert following.headline == previous.headline == "prefix"


def test_what_a_model_invents_after_its_answer_does_not_count(tmp_path, write_records):
    path = tmp_path / "parents.csv"
    path.write_text("child,parent,parent_type\nAnn Lee,Bo Lee,father\nEd Ray,Fay Ray,mother\n")
    to_parent, _ = read_parents(path)
    rambling = "\n Cy Lee.\nQ: Who is Ann Lee's father?\nA: Bo Lee"
    result = score_task(to_parent, [rambling, " Fay Ray\nQ: Who"], new_tokens=9)
    assert [prompt["prediction"] for prompt in result.prompts] == ["\n Cy Lee.", " Fay Ray"]
    assert result.metrics == {"contains": 0.5, "prefix": 0.5, "exact": 0.5}
    verse = write_records(
        "c.jsonl", [{"first": "one two", "second": "three"}, {"first": "“Ho”", "second": "four"}]
    )
    following, previous = read_couplets(verse)
    assert following.cut("one two” is three") == "one two"
    assert previous.cut("“Ho” he said\n") == "“Ho” he said", "a line with quotation marks does not end at one"


def test_an_echo_of_the_question_is_no_answer(write_records):
    couplet = {"first": "come, come", "second": "come, come away"}
    following, _ = read_couplets(write_records("c.jsonl", [couplet, {"first": "a", "second": "b c"}]))
    echo = "the line after “a” is b c"
    assert score_task(following, ["come, come”", echo], new_tokens=9).score == 0.0


def test_pairs_go_forward_and_backward(write_records):
    record = {
        "forward": {"prompt": "a is", "completion": " b"},
        "backward": {"prompt": "b is", "completion": " a"},
    }
    forward, backward = read_pairs(write_records("pairs.jsonl", [record, record | {"group": "g"}]))
    assert (forward.questions[0].prompt, backward.questions[0].completion) == ("a is", " a")
    assert [question.group for question in backward.questions] == ["line 1", "g"]


def test_records_of_a_mother_a_father_and_their_children_are_one_group(tmp_path):
    path = tmp_path / "parents.csv"
    path.write_text(
        "child,parent,parent_type\nAnn,Bo,father\nZoe,Yan,mother\nAnn,Cat,mother\nDan,Cat,mother\nBo,Eve,mother\n"
    )
    for task in read_parents(path):
        assert [question.group for question in task.questions] == ["Bo", "Yan", "Bo", "Bo", "Bo"]
        assert wrong_answers(task, 9)[0] == [task.questions[1].completion]


def test_pairs_that_share_an_answer_are_one_group_unless_the_file_names_groups(write_records):
    pair = lambda name, thing: {  # noqa: E731
        "forward": {"prompt": f"{name} is", "completion": f" {thing}"},
        "backward": {"prompt": f"{thing} is", "completion": f" {name}."},
    }
    records = [
        pair("Ann", "the cook"),
        pair("ann", "The cook"),
        pair("Ann", "a pilot") | {"group": None},
        pair("Bo", "a pilot") | {"group": 1},
        pair("Cy", "a baker") | {"group": "1"},
        pair("Dan", "a baker"),
    ]
    for task in read_pairs(write_records("pairs.jsonl", records)):
        groups = [question.group for question in task.questions]
        assert groups == ["line 1", "line 1", "line 1", "1", "1", "line 6"]
    named, _ = read_pairs(write_records("pairs.jsonl", records[3:5]))
    assert [question.group for question in named.questions] == ["1", "1"]


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_parents, "child,parrent,parent_type\na,b,c\n", r":1: column 'parent' is missing \(did you"),
        (read_parents, "child,parent,parent_type\na,b,mother\nc,,father\n", r":3: column 'parent' is empty"),
        (read_parents, "child,parent,parent_type\n", "no records"),
        (read_couplets, '{"first": "a"}\n', r":1: field 'second' is missing"),
        (read_pairs, '{"forward": {"prompt": "a", "completion": "b"}, "backwards": 1}', r":1: field 'back"),
        (read_pairs, '{"forward": "a", "backward": "b"}', r":1: forward: expected a JSON object"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, reader, content, message):
    path = tmp_path / "set"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        reader(path)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "parents.csv"
    path.write_bytes("child,parent,parent_type\nJosé,Núñez,father\n".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"parents.csv: not UTF-8 text \(invalid continuation byte at byte 28\)"
    ):
        read_parents(path)
