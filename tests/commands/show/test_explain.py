"""`bico-ds explain`: what is known of a key, its value in a recipe, and the files that are made of all keys."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bico_ds.commands.show.explain import main
from bico_ds.config.reference.keys import recipe_keys
from bico_ds.config.resources import RECIPES
from tests import ROOT


def explained(capsys, *words: str) -> str:
    assert main(words, prog="bico-ds explain") == 0
    return " ".join(capsys.readouterr().out.split())


def test_one_key_is_told_with_its_range_and_the_reason_default_and_example(capsys):
    shown = explained(capsys, "optimizer.lr")
    for part in (
        "optimizer.lr The learning rate after the warm-up",
        "value number from 1e-12 to 1 (a step moves each weight by about lr",
        "default 2e-05",
        "example --set optimizer.lr=1e-05 optimizer: lr: 1.0e-05",
    ):
        assert part in shown


def test_without_a_key_all_sections_are_told(capsys):
    shown = explained(capsys)
    assert all(f" {key.path[-1]} " in f" {shown} " for key in recipe_keys() if len(key.path) == 1)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("optimizer", ["lr", "betas", "eps", "weight_decay"]),
        ("data.sources", ["store", "files", "token_share"]),
        ("objectives", ["ntp", "bico", "masked_ft"]),
        ("objectives.bico", ["kind", "probability", "mask", "predict"]),
    ],
)
def test_of_a_section_its_keys_are_told(section, keys, capsys):
    shown = explained(capsys, section)
    assert all(f" {key} " in shown for key in keys)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["data.capacity", "tiny_bico"], ("160", "tiny_base.yaml", "capacity: 160")),
        (["objectives.bico.mask.rate", "tiny_bico"], ("0.4", "tiny_bico.yaml", "rate: 0.4")),
        (["objectives.1.mask.rate", "tiny_bico"], ("0.4", "tiny_bico.yaml", "rate: 0.4")),
        (["data.sources.facts_all.facts", "tiny_bico"], ("all", "tiny_bico.yaml", "facts: all")),
        (["model.config.hidden_size", "tiny_bico"], ("128", "tiny_base.yaml", "hidden_size: 128")),
    ],
)
def test_the_value_in_a_recipe_comes_with_the_line_that_sets_it(words, value, capsys):
    key, recipe = words
    number, file, text = value
    lines = (RECIPES / file).read_text().splitlines()
    line = next(index for index, written in enumerate(lines, start=1) if written.strip(" -") == text)
    shown = explained(capsys, key, "--recipe", recipe)
    assert f"in {recipe} {number} ({RECIPES / file}:{line})" in shown


def test_of_a_mapping_the_line_at_which_it_begins_is_told(capsys):
    lines = (RECIPES / "tiny_base.yaml").read_text().splitlines()
    shown = explained(capsys, "model.config", "--recipe", "tiny_bico")
    assert shown.endswith(f"({RECIPES / 'tiny_base.yaml'}:{lines.index('  config:') + 1})")


def test_a_default_and_an_override_are_told_from_what_a_file_sets(capsys):
    assert "in tiny_bico 1e-08 (the default)" in explained(capsys, "optimizer.eps", "--recipe", "tiny_bico")
    shown = explained(capsys, "optimizer", "--recipe", "tiny_bico", "--set", "optimizer.lr=3e-4")
    assert "lr: 0.0003 (--set optimizer.lr=3e-4)" in shown and "eps: 1e-08 (the default)" in shown


def test_a_secret_of_a_recipe_is_not_shown(capsys):
    words = ["model.config.api_key", "--recipe", "tiny_bico", "--set", "model.config.api_key=abcdef123"]
    assert "abcdef123" not in explained(capsys, *words)


def test_an_objective_of_ones_own_is_explained_with_its_recipe(tmp_path):
    """In a process of its own: a kind stays registered."""
    (tmp_path / "mine.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from pydantic import Field\n"
        "from bico_ds.config.objectives.ntp import NtpSpec\n"
        "from bico_ds.config.objectives.table import register\n"
        "class Mine(NtpSpec):\n"
        '    kind: Literal["mine"] = "mine"\n'
        '    speed: int = Field(3, description="how fast it is")\n'
        'register(Mine, "mine:Mine")\n'
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: tiny_bico\nimports: [mine.py]\nobjectives: [{kind: mine}]\n")
    words = ["explain", "objectives.mine.speed", "--recipe", "mine.yaml"]
    shown = run(words, tmp_path)
    assert "How fast it is." in shown and "value whole number default 3" in " ".join(shown.split())
    schema = json.loads(run(["explain", "--json-schema", "--recipe", "mine.yaml"], tmp_path))
    kinds = [entry["properties"] for entry in schema["properties"]["objectives"]["items"]["anyOf"]]
    assert "speed" in next(entry for entry in kinds if entry["kind"]["enum"] == ["mine"])


def run(words, folder) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bico_ds", *words], cwd=folder, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("option", "file"),
    [("--markdown", "docs/recipe.md"), ("--json-schema", "recipes/recipe.schema.json")],
)
def test_what_is_checked_in_is_what_the_command_writes(option, file):
    """In a process of its own, where no other test has added a kind of objective."""
    assert (ROOT / file).read_text(encoding="utf-8") == run(["explain", option], ROOT), "run: make reference"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizr.lr"], "there is no key 'optimizr.lr' (did you mean 'optimizer.lr'?)"),
        (["optimizer.lr", "--recipe", "tiny_bicoo"], "did you mean 'tiny_bico'?"),
        (["a..b"], "KEY: expected a key, as in objectives.bico.mask.rate"),
        (
            ["objectives.7.mask", "--recipe", "tiny_bico"],
            "'objectives' has the indices 0 to 1: 0 is ntp, 1 is bico",
        ),
        (["optimizer.lr.x", "--recipe", "tiny_bico"], "'optimizer.lr' is a single value, it has no keys"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words, message, capsys):
    assert main(words, prog="bico-ds explain") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr", "--json-schema"], "leave KEY out"),
        (["optimizer.lr", "--set", "optimizer.lr=1"], "give --recipe too"),
        (["--markdown", "--json-schema"], "not allowed with"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words, prog="bico-ds explain")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
