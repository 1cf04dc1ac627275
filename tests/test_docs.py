"""The documentation points at things that exist."""

from __future__ import annotations

import re

import pytest

from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_picture_exists(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_recipe_named_exists(page):
    text = page.read_text(encoding="utf-8")
    scripts = set(re.findall(r"\b((?:tools|launch)/[\w/]+\.(?:py|sbatch))\b", text))
    assert not [script for script in scripts if not (ROOT / script).is_file()]
    recipes = set(re.findall(r"--recipe ([a-z]\w*)\b(?![./])", text))
    assert not [name for name in recipes if not (ROOT / "recipes" / f"{name}.yaml").is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_option_of_our_commands_exists(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"\b((?:launch|tools)/[\w/]+\.py)([^\n`|#;]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        for name in re.findall(r"^\s*from ((?:bico_ds|launch|tools)[\w.]*) import", source, re.MULTILINE):
            module = ROOT / (name.replace(".", "/") + ".py")
            source += module.read_text(encoding="utf-8") if module.is_file() else ""
        options = set(re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest)) - {"--help"}
        missing = [option for option in options if f'"{option}"' not in source]
        assert not missing, f"{script} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_placeholder_is_left(page):
    assert not re.search(r"@@|TODO|FIXME|^MEASURED$", page.read_text(encoding="utf-8"), re.MULTILINE)
