"""`checkpoint.keep_best` goes by what the recipe's evaluations give, and everything else is refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe, recorded_recipe, recorded_values
from bico_ds.config.sections.evaluation import Metric
from bico_ds.config.sections.keep_best import LIKELIHOOD_METRICS
from bico_ds.evaluation.results import CHOICE_SCALARS
from bico_ds.evaluation.scoring.metrics import METRICS

TASKS = "[n2d_reverse, {kind: text, name: wiki, file: wiki.txt}, {kind: held_out, name: mine, store: stores/mine}]"


def recipe_file(folder: Path, metric: str, *, every: str = "5", others: str = "null") -> str:
    path = folder / "recipe.yaml"
    path.write_text(
        f"extends: tiny_bico\nevaluation:\n  tasks: {TASKS}\n  every_steps: {every}\n  likelihood_others: {others}\n"
        f"checkpoint:\n  keep_best:\n    metric: {metric}\n    mode: max\n"
    )
    return str(path)


def test_its_words_are_those_of_the_metrics_themselves():
    assert tuple(METRICS) == get_args(Metric)
    assert CHOICE_SCALARS == LIKELIHOOD_METRICS


@pytest.mark.parametrize(
    "metric",
    [
        *("n2d_reverse/headline", "n2d_reverse/exact", "text/wiki/perplexity", "text/wiki/times_base"),
        *("held_out/mine/ntp", "held_out/mine/bico"),
    ],
)
def test_what_an_evaluation_gives_is_accepted(tmp_path, metric):
    recipe = load_recipe(recipe_file(tmp_path, metric))
    assert recipe.checkpoint.keep_best is not None
    assert recipe.checkpoint.keep_best.metric == metric
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_likelihoods_are_there_where_they_are_asked_for(tmp_path):
    assert load_recipe(recipe_file(tmp_path, "n2d_reverse/forced_choice", others="3"))
    with pytest.raises(UserError, match="no evaluation of this recipe gives 'n2d_reverse/forced_choice'"):
        load_recipe(recipe_file(tmp_path, "n2d_reverse/forced_choice"))


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("n2d_revers/headline", "did you mean 'n2d_reverse/headline'"),
        ("held_out/mine/bicco", "did you mean 'held_out/mine/bico'"),
        ("held_out/yours/ntp", "did you mean 'held_out/mine/ntp'"),
        ("evaluation/n2d_reverse/headline", "there are n2d_reverse/headline, held_out/mine/ntp"),
        ("loss/all", "there are n2d_reverse/headline"),
    ],
)
def test_another_metric_is_refused_with_its_line_and_the_nearest_one(tmp_path, metric, hint):
    with pytest.raises(UserError, match=rf"recipe\.yaml:8: checkpoint\.keep_best\.metric: .*{hint}"):
        load_recipe(recipe_file(tmp_path, metric))


def test_a_single_evaluation_at_the_end_leaves_nothing_to_choose_from(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.keep_best: .*set 'evaluation\.every_steps'"):
        load_recipe(recipe_file(tmp_path, "held_out/mine/ntp", every="null"))


def test_a_recorded_recipe_is_read_without_the_objective_that_the_best_goes_by(tmp_path):
    """As `bico-ds export` reads a checkpoint of an objective whose module is gone."""
    values = recorded_values(load_recipe(recipe_file(tmp_path, "held_out/mine/bico")))
    assert recorded_recipe(values, tmp_path / "manifest.json", objectives=False).checkpoint.keep_best is None
