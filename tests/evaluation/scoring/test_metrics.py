from __future__ import annotations

import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from bico_ds.evaluation.scoring.metrics import (
    bleu,
    char_bleu,
    contains,
    exact,
    floors,
    prefix,
    score_predictions,
    wrong_answers,
)
from bico_ds.evaluation.tasks.task import Question, Task


def _task(answers: list[str], groups: list[str], kind="description") -> Task:
    questions = tuple(
        Question(prompt="p", completion=answer, group=group, line=i + 1)
        for i, (answer, group) in enumerate(zip(answers, groups, strict=True))
    )
    return Task(name="t", answer_kind=kind, questions=questions, path="t.jsonl")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (" Ann Lee.", (1, 1, 1)),
        (" ann  lee", (1, 1, 1)),
        ("Ann Lee lives on.", (1, 1, 0)),
        ("nobody but Ann Lee", (1, 0, 0)),
        ("Ann", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_exact_implies_prefix_implies_contains(prediction, expected):
    assert (
        contains(prediction, " Ann Lee"),
        prefix(prediction, " Ann Lee"),
        exact(prediction, " Ann Lee"),
    ) == expected


def test_character_bleu_agrees_with_sacrebleu_on_spelled_out_characters():
    oracle = BLEU(tokenize="none", smooth_method="none", force=True)
    spell = lambda text: " ".join("␣" if c == " " else c for c in text.strip())  # noqa: E731
    draw = random.Random(3)
    for _ in range(40):
        one, two = ("".join(draw.choices("abc ", k=draw.randint(4, 40))) for _ in range(2))
        if len(one.strip()) < 4 or "  " in one + two:
            continue
        expected = oracle.sentence_score(spell(one), [spell(two)]).score / 100
        assert char_bleu(one, two) == pytest.approx(expected, abs=1e-9)
    assert char_bleu("", "abc") == 0.0


def test_word_bleu_is_one_for_the_answer_and_small_for_other_words():
    assert bleu(" the author of a book.", " the author of a book.") == pytest.approx(1.0)
    assert bleu(" my dog sleeps well", " the author of a book.") < 0.1


def test_floor_is_the_score_of_the_other_persons_answers():
    answers = [" the author of a long book.", " the author of a film now.", " the cook of a long meal."]
    task = _task([a for a in answers for _ in range(2)], ["a", "a", "b", "b", "c", "c"])
    pairs = [(x, y) for x in answers for y in answers if x != y]
    floor = floors(task)
    assert floor["bleu"] == pytest.approx(sum(bleu(x, y) for x, y in pairs) / len(pairs))
    assert floor["char_bleu"] > 0.2
    assert floor["contains"] == 0.0
    assert floors(_task([" one person of all"], ["a"])) == {}


def test_short_answers_have_no_bleu_and_scores_keep_the_order_of_prompts():
    scores = score_predictions(_task([" x .", " y ."], ["a", "b"]), ["x .", "x ."])
    assert scores == {"contains": [1.0, 0.0], "prefix": [1.0, 0.0], "exact": [1.0, 0.0]}


def test_no_right_answer_is_offered_as_another_persons():
    draw = random.Random(5)
    texts = [draw.choice("uvwxyz") for _ in range(40)]
    task = _task([f" {text}." for text in texts], [str(i // 2) for i in range(40)])
    offered = wrong_answers(task, 3)
    assert {len(answers) for answers in offered} == {3}
    assert all(f" {text}." not in answers for text, answers in zip(texts, offered, strict=True))
    either = Question(prompt="p", completion=" u", group="a", line=1, alternatives=(" V.",))
    others = tuple(Question(prompt="p", completion=f" {x}", group=x, line=2) for x in "vw")
    task = Task(name="t", answer_kind="name", questions=(either, *others), path="t.jsonl")
    assert wrong_answers(task, 9) == [[" w"], [" w"], [" u"]]


def test_a_floor_counts_answers_that_are_right_by_chance():
    task = _task([" x", " x", " y"], ["a", "b", "c"], kind="name")
    assert floors(task)["exact"] == pytest.approx(2 / 6)
    assert wrong_answers(task, 9) == [[" y"], [" y"], [" x"]]
