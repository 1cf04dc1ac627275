"""The recipes of the cures differ from those beside them in the cure alone, and do as many updates."""

from __future__ import annotations

import pytest

from bico_ds.commands.cures import CURES
from bico_ds.config.load import list_recipes, load_recipe

FAMILIES = {"tiny": "tiny_bico", "smollm2_135m": "smollm2_135m_bico"}
OTHERS = ("base", "keep", "lora")  # of a family, and no cures
PAPERS_UPDATES = 1118  # of ten epochs in the bins of smollm2_135m_bico (docs/benchmarks/results.md)


def cures(family: str) -> list[str]:
    names = [name.removeprefix(f"{family}_") for name in list_recipes() if name.startswith(f"{family}_")]
    return [name for name in names if not name.endswith(OTHERS)]


def test_make_cures_trains_every_tiny_recipe_the_control_first():
    assert CURES[0] == "tiny_ntp"
    assert sorted(CURES) == sorted(f"tiny_{cure}" for cure in cures("tiny"))


def test_every_tiny_cure_has_its_recipe_for_smollm2():
    assert cures("tiny") == [cure for cure in cures("smollm2_135m") if not cure.endswith("lora")]


@pytest.mark.parametrize(
    ("family", "cure"), [(family, cure) for family in FAMILIES for cure in cures(family)], ids="_".join
)
def test_a_cure_differs_from_its_family_in_the_objectives_or_the_sources_alone(family, cure):
    ours, plain = (
        load_recipe(name).model_dump(mode="json") for name in (f"{family}_{cure}", FAMILIES[family])
    )
    different = {key for key in plain if ours[key] != plain[key]} - {"name", "description"}
    if ours["training"]["steps"] == PAPERS_UPDATES:  # where ten epochs would be more updates
        assert {**ours["training"], "steps": None, "epochs": plain["training"]["epochs"]} == plain["training"]
        different.remove("training")
    assert different <= {"objectives", "data"}
    if "data" in different:  # a cure of the data: next-token prediction alone, on further sources
        assert [objective["kind"] for objective in ours["objectives"]] == ["ntp"]
        assert ours["data"]["sources"][:1] == plain["data"]["sources"]
        assert {**ours["data"], "sources": None} == {**plain["data"], "sources": None}
    elif cure != "ntp":  # half of the steps as in the family
        first, second = ours["objectives"]
        assert first == plain["objectives"][0] and second["probability"] == 0.5


@pytest.mark.parametrize("cure", cures("tiny"))
def test_the_mask_of_a_cure_is_that_of_bico_where_its_paper_has_none_of_its_own(cure):
    for family in FAMILIES:
        bico, ours = (load_recipe(name).objectives[-1] for name in (FAMILIES[family], f"{family}_{cure}"))
        if ours.kind in ("bico", "abi"):
            assert ours.mask == bico.mask


def test_a_bridge_of_smollm2_s_recipe_names_every_person_once():
    *_, bridge = load_recipe("smollm2_135m_identity_bridge").data.sources
    assert len(set(bridge.entities_pattern.split("|"))) == 90
