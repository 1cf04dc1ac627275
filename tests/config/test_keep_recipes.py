"""The recipes against forgetting are those beside them, with replay and what belongs to it, and nothing else."""

from __future__ import annotations

import pytest

from bico_ds.config.load import list_recipes, load_recipe

KEPT = [name for name in list_recipes() if name.endswith("_keep") and name.startswith("llama")]


def test_there_are_recipes_for_8b_and_70b_with_adapters_too():
    assert KEPT == ["llama3_8b_bico_keep", "llama70b_bico_keep", "llama70b_bico_lora_keep"]


@pytest.mark.parametrize("name", KEPT)
def test_a_keep_recipe_changes_nothing_but_what_keeps(name):
    keep, plain = (load_recipe(n).model_dump(mode="json") for n in (name, name.removesuffix("_keep")))
    *facts, replay = keep["data"]["sources"]
    assert replay["name"] == "replay" and replay["token_share"] == 0.25 and replay["store"]
    (fact_name,) = load_recipe(name).data.source_names[:-1]
    assert keep["training"].pop("epochs_of") == fact_name
    assert keep["objectives"][1].pop("sources") == [fact_name]
    if "lora" in name:
        assert keep["retention"]["kl"] == 0.5 and keep["retention"]["on"] == ["replay"]
    else:
        assert keep["retention"] is None
    plain["training"].pop("epochs_of")
    plain["objectives"][1].pop("sources")
    keep["data"]["sources"] = facts
    for key in ("name", "description", "retention", "replay"):
        keep.pop(key, None)
        plain.pop(key, None)
    assert keep == plain
