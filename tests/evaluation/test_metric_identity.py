"""Two values of a metric compare where its identity is equal: what they were measured on, wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.evaluation.metric_identity import metric_identity
from bico_ds.evaluation.run_tasks import GenerationOptions
from bico_ds.evaluation.scoring.metrics import METRICS
from bico_ds.evaluation.tasks.of_recipe import tasks_of_recipe

ROWS = [{"prompt": f"Who lives at number {n}?", "answer": f"Person {n}"} for n in range(4)]


def identity(
    folder: Path, metric: str = "own/headline", rows=ROWS, tokens: int = 8, others=None, **entry
) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = json.dumps({"kind": "questions", "name": "own", "file": str(file), **entry})
    tasks = tasks_of_recipe(load_recipe("tiny_bico", [f"evaluation.tasks=[{own}]"]))
    options = GenerationOptions(max_new_tokens=tokens, add_bos=False)
    return metric_identity(metric, tasks=tasks, texts=[], held_out=[], options=options, others=others)


def test_of_a_task_it_is_the_questions_and_how_they_are_answered_and_scored(tmp_path):
    first = identity(tmp_path)
    assert identity(tmp_path / "moved") == first
    assert identity(tmp_path, metric="own/contains") == first, "which is the headline"
    changed = [
        identity(tmp_path, limit=2), identity(tmp_path, rows=ROWS[:3]), identity(tmp_path, rows=ROWS[::-1]),
        identity(tmp_path, tokens=4), identity(tmp_path, rows=[{**row, "answer": "Ada"} for row in ROWS]),
        identity(tmp_path, "own/rank", others=2), identity(tmp_path, "own/rank", others=3),
    ]  # fmt: skip
    assert len({first, *changed}) == 1 + len(changed)


def test_another_headline_metric_is_another_identity(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = set()
    for metric in METRICS:
        own = json.dumps({"kind": "questions", "name": "own", "file": str(file), "metric": metric})
        tasks = tasks_of_recipe(load_recipe("tiny_bico", [f"evaluation.tasks=[{own}]"]))
        options = GenerationOptions(max_new_tokens=8, add_bos=False)
        found.add(
            metric_identity("own/headline", tasks=tasks, texts=[], held_out=[], options=options, others=None)
        )
    assert len(found) == len(METRICS)


def test_of_texts_and_stores_it_is_their_own():
    def named(name: str, **rest) -> SimpleNamespace:
        return SimpleNamespace(spec=SimpleNamespace(name=name), **rest)

    texts = [named("a", identity="of a"), named("b", identity="of b")]
    stores = [
        named("a", batches={"ntp": SimpleNamespace(identity="n"), "bico": SimpleNamespace(identity="b")})
    ]
    given = {
        "tasks": [],
        "texts": texts,
        "held_out": stores,
        "options": GenerationOptions(add_bos=False),
        "others": None,
    }
    assert metric_identity("text/b/times_base", **given) == "of b"
    assert metric_identity("held_out/a/bico", **given) == "b"
    with pytest.raises(KeyError):
        metric_identity("text/c/perplexity", **given)
