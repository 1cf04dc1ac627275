"""What licences ask of a model that is passed on: known by their titles, stated as their own text has it."""

from __future__ import annotations

import pytest

from bico_ds.training.export.licences import LICENCES, licence_of_card, licence_of_text

# The beginnings of licences as they lie in model folders.
TEXTS = {
    "llama2": 'LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\nLlama 2 Version Release Date: July 18, 2023\n\n"Agreement" means',
    "llama3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date: April 18, 2024\n“Agreement”",
    "llama3.1": " LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\n Llama 3.1 Version Release Date: July 23, 2024\n\n“Agreement”",
    "llama3.2": "**LLAMA 3.2 COMMUNITY LICENSE AGREEMENT**\n\nLlama 3.2 Version Release Date: September 25, 2024",
    "llama3.3": "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT\n Llama 3.3 Version Release Date: December 6, 2024",
    "qwen": "Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n\nBy clicking",
    "qwen-research": "Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date: September 19, 2024",
    "apache-2.0": "\n                                 Apache License\n                   Version 2.0, January 2004\n",
    "mit": "MIT License\n\nCopyright (c) 2024 Somebody\n\nPermission is hereby granted, free of charge, to any person",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_licence_is_known_by_its_title(name: str) -> None:
    licence = licence_of_text(TEXTS[name])
    assert licence is not None and (licence.hub_name or licence.hub_id) == name


def test_every_known_licence_is_among_the_texts() -> None:
    assert {licence.hub_name or licence.hub_id for licence in LICENCES} == set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_a_licence_is_known_by_what_the_hub_calls_it(name: str) -> None:
    licence = licence_of_text(TEXTS[name])
    assert licence is not None
    values = {"license": licence.hub_id, "license_name": licence.hub_name}
    assert licence_of_card({key: value for key, value in values.items() if value is not None}) == licence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "LLAMA 31 COMMUNITY LICENSE AGREEMENT",
        "This model is not under the Apache License.",
        "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc.",
        "x " * 400 + "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
    ],
)
def test_other_texts_are_no_licence_that_is_known(text: str) -> None:
    assert licence_of_text(text) is None


def test_what_a_card_names_otherwise_is_none_that_is_known() -> None:
    assert licence_of_card({"license": "other"}) is None
    assert licence_of_card({"license": "other", "license_name": "mine"}) is None
    assert licence_of_card({"license": ["mit"]}) is None and licence_of_card({}) is None


@pytest.mark.parametrize(
    ("licence", "name", "allowed"),
    [
        ("llama3", "Llama-3-8B-company", True),
        ("llama3", "llama3_8b_company", True),
        ("llama3", "Llama-8B-company", False),  # it asks for “Llama 3”
        ("llama3", "my-Llama-3", False),
        ("llama3.1", "Llama-company", True),
        ("llama3.1", "company-Llama", False),
        ("llama2", "company", True),  # it has no rule for names
        ("qwen", "company", True),
        ("apache-2.0", "company", True),
    ],
)
def test_a_name_is_allowed_as_section_1_b_says(licence: str, name: str, allowed: bool) -> None:
    """“you shall also include “Llama 3” at the beginning of any such AI model name”; from 3.1 on, “Llama”."""
    found = licence_of_text(TEXTS[licence])
    assert found is not None and found.allows_name(name) == allowed
    assert found.allows_name(found.suggested(name))


def test_the_conditions_are_those_of_the_texts() -> None:
    asked = {name: " ".join(found.conditions()) for name in TEXTS if (found := licence_of_text(TEXTS[name]))}
    assert "“Built with Meta Llama 3” is shown" in asked["llama3"]
    assert "begins with “Llama 3”" in asked["llama3"]
    notice = (
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc."
    )
    assert notice in asked["llama3"]
    assert "“Built with Llama” is shown" in asked["llama3.1"] and "begins with “Llama”" in asked["llama3.1"]
    notice = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc."
    assert f"“{notice} All Rights Reserved.”" in asked["llama3.1"]
    assert "Built with" not in asked["llama2"] and "begins with" not in asked["llama2"]
    assert "“Built with Qwen” or “Improved using Qwen” is shown" in asked["qwen"]
    assert "nothing commercial" in asked["qwen-research"] and "nothing commercial" not in asked["qwen"]
