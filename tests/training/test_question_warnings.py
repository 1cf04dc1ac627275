"""A recipe whose scores are other than they seem is warned of before the first step."""

from __future__ import annotations

import json

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.training import assembly


def warnings_of(*settings: str) -> list[str]:
    recipe = load_recipe("tiny_base", list(settings))
    return assembly.question_warnings(recipe, assembly.open_inputs(recipe, weights_needed=False))


def test_answers_that_are_longer_than_what_is_generated_are_counted(tmp_path):
    answers = ["a", "b " * 30, "c " * 8]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Who?", "answer": answer}) + "\n" for answer in answers))
    task = f"evaluation.tasks=[{{kind: questions, name: own, file: {file}}}]"
    (told,) = warnings_of(task, "evaluation.max_new_tokens=4")
    assert told.startswith("task own: 2 of 3 answers have more tokens than evaluation.max_new_tokens (4)")
    assert warnings_of(task, "evaluation.max_new_tokens=200") == []


@pytest.mark.parametrize(
    ("metric", "good", "bad"), [("text/own/perplexity", "min", "max"), ("d2n/headline", "max", "min")]
)
def test_a_best_that_would_be_the_worst_is_told(tmp_path, metric, good, bad):
    file = tmp_path / "own.txt"
    file.write_text("some other text, long enough to have a token that is predicted\n")
    given = (f"evaluation.tasks=[d2n, {{kind: text, name: own, file: {file}}}]", "evaluation.every_steps=5")
    best = "checkpoint.keep_best={metric: %s, mode: %s}"
    (told,) = warnings_of(*given, best % (metric, bad))
    assert f"of {metric} is better, and mode {bad} keeps and exports the worst" in told
    assert warnings_of(*given, best % (metric, good)) == []
