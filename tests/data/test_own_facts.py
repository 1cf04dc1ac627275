"""The texts and questions of docs/examples/own_facts: enough of them, and no question whose answer a text gives as asked."""

from __future__ import annotations

import json
from collections import Counter

from bico_ds.config.load import load_recipe
from bico_ds.evaluation.tasks.further_sets import read_pairs
from bico_ds.evaluation.tasks.text_search import QuestionSearch
from tests import ROOT

FOLDER = ROOT / "docs" / "examples" / "own_facts"


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_there_are_so_many_facts_in_several_wordings_each():
    texts = rows("facts.jsonl")
    wordings = Counter(text["fact"] for text in texts)
    assert len({text["entity"] for text in texts}) >= 50
    assert len(wordings) >= 200 and min(wordings.values()) >= 4
    assert len({text["text"] for text in texts}) == len(texts)


def test_no_text_answers_a_reverse_question_in_the_order_asked_and_all_answer_the_forward_ones():
    forward, backward = read_pairs(FOLDER / "questions.jsonl")
    search = QuestionSearch([forward, backward])
    for text in rows("facts.jsonl"):
        search.read(text["text"])
    assert set(search.orders(forward)) == {"same"}
    assert set(search.orders(backward)) == {"reverse"}


def test_no_prompt_is_a_wording_of_the_texts():
    texts = [text["text"] for text in rows("facts.jsonl")]
    for task in read_pairs(FOLDER / "questions.jsonl"):
        for question in task.questions:
            assert not [text for text in texts if text.startswith(question.prompt)], question.prompt


def test_the_recipe_keeps_the_checkpoint_that_answers_most_reverse_questions():
    recipe = load_recipe(str(FOLDER / "recipe.yaml"))
    assert recipe.checkpoint.keep_best is not None
    assert recipe.checkpoint.keep_best.metric == "company_backward/headline"
    assert recipe.evaluation.task_names == ["company_forward", "company_backward"]
