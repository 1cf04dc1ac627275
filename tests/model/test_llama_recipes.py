"""The Llama recipes: the published architectures, and twins that differ in their objective alone."""

from __future__ import annotations

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.model.architecture import model_config, parameter_count

PUBLISHED_PARAMETERS = {
    "llama2_7b_bico": 6_738_415_616,
    "llama2_13b_bico": 13_015_864_320,
    "llama2_70b_bico": 68_976_648_192,
    "llama3_8b_bico": 8_030_261_248,
    "llama70b_bico": 70_553_706_496,
    "llama70b_bico_lora": 70_553_706_496,
    "llama70b_bico_offload": 70_553_706_496,
}


@pytest.fixture(autouse=True)
def _data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BICO_DS_DATA", "data")


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_a_recipe_has_the_published_models_parameters_and_divides_over_its_ranks(name: str) -> None:
    recipe = load_recipe(name)
    config = model_config(recipe.model.model_copy(update={"path": None}))
    assert parameter_count(config) == PUBLISHED_PARAMETERS[name]
    ranks = recipe.distributed.world_size or 4
    assert recipe.training.global_batch_bins % (recipe.training.micro_batch_bins * ranks) == 0


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_its_twin_differs_in_the_objective_alone(name: str) -> None:
    recipe, twin = load_recipe(name), load_recipe(name.replace("_bico", "_ntp"))
    same = {"name": "", "description": "", "objectives": twin.objectives}
    assert recipe.model_copy(update=same) == twin.model_copy(update=same)
    assert [objective.kind for objective in twin.objectives] == ["ntp"]
