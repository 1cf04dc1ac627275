"""The entries of `evaluation.tasks`: what each kind makes, and what is told of a mistake in one."""

from __future__ import annotations

from typing import get_args

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.config.sections.evaluation import DIRECTIONS, Metric, QuestionFileSpec, QuestionKind
from bico_ds.evaluation.scoring.metrics import METRICS
from bico_ds.evaluation.tasks.further_sets import READERS

PAIRS = "{kind: pairs, name: company, file: q.jsonl}"
EVERY_KIND = (
    "evaluation.tasks=[n2d, {kind: couplets, name: poems, file: c.jsonl}, {kind: text, name: wiki, file: w.txt}, "
    "{kind: questions, name: policy, file: q.jsonl, metric: exact, limit: 3}, {kind: parents, name: celebs, file: p.csv}, "
    f"{PAIRS}]"
)


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny_base", overrides)
    return str(caught.value)


def test_results_are_called_by_entry_and_direction_in_the_recipes_order():
    spec = load_recipe("tiny_base", [EVERY_KIND]).evaluation
    assert spec.task_names == [
        "n2d", "poems_next_line", "poems_previous_line", "policy", "celebs_child_to_parent",
        "celebs_parent_to_child", "company_forward", "company_backward",
    ]  # fmt: skip
    assert spec.reversal_tasks == ["n2d"] and [text.name for text in spec.texts] == ["wiki"]


def test_a_kept_recipe_has_the_same_entries(tmp_path):
    recipe = load_recipe("tiny_base", [EVERY_KIND])
    kept = tmp_path / "recipe.yaml"
    kept.write_text(dump_recipe(recipe))
    assert load_recipe(str(kept)).evaluation == recipe.evaluation


def test_an_entry_is_named_in_set_as_elsewhere():
    changed = [EVERY_KIND, "evaluation.tasks.company.metric=prefix", "evaluation.tasks.wiki.tokens=9"]
    spec = load_recipe("tiny_base", changed).evaluation
    assert spec.question_files[-1].metric == "prefix" and spec.texts[0].tokens == 9


def test_kinds_and_metrics_are_those_that_can_be_read_and_scored():
    assert set(get_args(QuestionKind)) == set(READERS) == set(DIRECTIONS)
    assert get_args(Metric) == tuple(METRICS)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("{kind: pair, name: a, file: x}", "evaluation.tasks.0.kind: must be one of pairs, parents, couplets, questions, "
         "text, held_out (found 'pair') (did you mean 'pairs'?)"),
        ("{kind: [pairs], name: a, file: x}", "evaluation.tasks.0.kind: must be one of pairs"),
        ("n2d, {kind: pairs, name: a}", "evaluation.tasks.1.file: this key is required"),
        ("{kind: pairs, name: a, file: x, metrik: exact}", "unknown key (did you mean 'metric'?); known keys here: kind, "
         "name, file, metric, limit"),
        ("{name: a, file: x, metric: exact}", "known keys here: kind, name, file, store, tokens, window, stop_if_above"),
        ("{kind: pairs, name: a, file: x, metric: exat}", "evaluation.tasks.0.metric: Input should be 'contains', 'prefix', "
         "'exact', 'bleu' or 'char_bleu' (found 'exat') (did you mean 'exact'?)"),
        ("{kind: pairs, name: a/b, file: x}", "evaluation.tasks.0.name: String should match pattern"),
        ("{kind: pairs, name: a, file: x, limit: 0}", "evaluation.tasks.0.limit: must be at least 1"),
        (f"{PAIRS}, {PAIRS}", "evaluation.tasks.1.name: 'company' is the name of entry 0 ('company') too"),
        (f"{PAIRS}, {{name: company, file: x}}", "evaluation.tasks.1.name: 'company' is the name of entry 0"),
        (f"{PAIRS}, {{kind: questions, name: company_backward, file: x}}", "'company_backward' is the name of entry 0"),
        (f"{{kind: questions, name: company_backward, file: x}}, {PAIRS}", "'company_backward' is the name of entry 0"),
        ("n2d, {kind: questions, name: n2d, file: x}", "evaluation.tasks.1.name: 'n2d' is the name of task 'n2d' too"),
        ("{kind: questions, name: text, file: x}", "'text' is the name of other numbers too"),
        ("{kind: questions, name: curves, file: x}", "'curves' is the name of other numbers too"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry_is_told_once_with_its_key(entries, expected):
    message = error_of(f"evaluation.tasks=[{entries}]")
    assert expected in message and len(message.splitlines()) == 1


def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: tiny_base\nevaluation:\n  tasks:\n    - n2d\n    - kind: pairs\n      name: company\n      fiel: q.jsonl\n"
    )
    with pytest.raises(
        UserError, match=r"mine.yaml:7: evaluation.tasks.1.fiel: unknown key \(did you mean 'file'"
    ):
        load_recipe(str(file))


def test_what_was_valid_stays_so():
    """A text may be called as a task is: its numbers stand apart."""
    spec = load_recipe("tiny_base", ["evaluation.tasks=[n2d, {name: n2d, file: x}]"]).evaluation
    assert [type(task) is QuestionFileSpec for task in spec.tasks] == [False, False]
