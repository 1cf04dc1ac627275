"""Recipes: what loads, and the message of every mistake."""

from __future__ import annotations

import pytest

from bico_ds.config.load import dump_recipe, list_recipes, load_recipe
from tests.config.mistakes import error_of

MINIMAL = """\
description: a test
model:
  config: {model_type: llama, rms_norm_eps: 1e-5}
data:
  sources:
    - facts: all
objectives:
  - kind: ntp
training:
  steps: 3
"""


@pytest.mark.parametrize("name", list(list_recipes()))
def test_every_shipped_recipe_is_valid_and_described(name):
    assert load_recipe(name).description


def test_a_dumped_recipe_loads_to_the_same_recipe(recipe_file):
    recipe = load_recipe("tiny_bico", ["seed=7"])
    assert load_recipe(recipe_file(dump_recipe(recipe), "dumped")) == recipe


SECRETS = """\
deepspeed: {overrides: {hub: {api_key: abc123}}}
output_dir: https://me:abc123@host/x
"""


def test_a_dumped_recipe_has_no_secrets_and_what_needs_them_says_so(recipe_file):
    dumped = dump_recipe(load_recipe(recipe_file(MINIMAL + SECRETS), ["description=by hf_abc123abc123"]))
    assert "abc123" not in dumped
    kept = recipe_file(dumped, "kept")
    line = 1 + next(n for n, line in enumerate(dumped.splitlines()) if "output_dir" in line)
    assert error_of(kept) == (
        f"{kept}:{line}: output_dir: a secret that was left out where this recipe was kept; give it again: "
        "--set output_dir=VALUE"
    )
    again = ["output_dir=${HOME}/x", "deepspeed.overrides.hub.api_key=xyz"]
    assert "deepspeed.overrides.hub.api_key: a secret that was left out" in error_of(kept, again[0])
    recipe = load_recipe(kept, again)
    assert recipe.deepspeed.overrides["hub"]["api_key"] == "xyz"
    assert recipe.description == "by (not recorded)"


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.password=abc123",
        "password",
        "monitor.wandb={project: x, api_key: abc123}",
        "monitor.wandb={project: x, api_key: 'abc123",
        "seed=https://me:abc123@host",
        "objectives.9.token=abc123",
        "name={token: abc123}",
        "secrets+=abc123",
        "=password=abc123",
    ],
)
def test_an_error_about_an_override_shows_no_secret(override):
    error = error_of("tiny_base", override)
    assert "--set" in error
    assert "abc123" not in error


def test_scientific_notation_without_a_dot_is_a_number(recipe_file):
    assert load_recipe(recipe_file(MINIMAL)).model.config["rms_norm_eps"] == 1e-5


def test_extends_merges_mappings_and_replaces_lists(recipe_file):
    recipe_file(MINIMAL, "base")
    child = recipe_file("extends: base\noptimizer: {lr: 1e-3}\nobjectives:\n  - kind: bico\n", "child")
    recipe = load_recipe(child)
    assert [o.kind for o in recipe.objectives] == ["bico"]
    assert recipe.optimizer.lr == 1e-3
    assert recipe.training.steps == 3


def test_the_ntp_twin_differs_from_bico_in_its_objectives_alone():
    bico, ntp = (load_recipe(name).model_dump() for name in ("tiny_bico", "tiny_ntp"))
    different = {key for key in bico if bico[key] != ntp[key]}
    assert different == {"name", "description", "objectives"}


def test_overrides_reach_into_lists_and_sections_that_the_file_leaves_out(recipe_file):
    recipe = load_recipe("tiny_bico", ["objectives.1.mask.rate=[0.2, 1.0]", "monitor.wandb.project=p"])
    assert recipe.objectives[1].mask.rate == (0.2, 1.0)
    assert recipe.monitor.wandb.project == "p"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "training:",
            "trainng:",
            ["mine.yaml:9: trainng: unknown key (did you mean 'training'?)", "required"],
        ),
        ("steps: 3", "stepz: 3", ["mine.yaml:10: training.stepz: unknown key (did you mean 'steps'?)"]),
        ("steps: 3", "steps: three", ["mine.yaml:10: training.steps:", "'three'"]),
        (
            "steps: 3",
            "steps: 3\n  epochs: 1",
            ["mine.yaml:9: training: give exactly one of 'steps' and 'epochs'"],
        ),
        (
            "steps: 3",
            "steps: 3\noptimizer:\n  betas: [0.9, 1.0]",
            ["mine.yaml:12: optimizer.betas.1: ", "less than 1"],
        ),
        ("steps: 3", "steps: 3\noptimizer:\n  lr: .inf", ["mine.yaml:12: optimizer.lr: ", "finite"]),
        ("steps: 3", "steps: 3\n  steps: 4", ["mine.yaml:11: key 'training.steps' is given twice"]),
        (
            "kind: ntp",
            "kind: npt",
            ["mine.yaml:8: objectives.0.kind:", "did you mean 'ntp'", "known are ntp, bico"],
        ),
        ("kind: ntp", "kind: ntp\n    probability: 0.5", ["must sum to 1, found 0.5"]),
        ("kind: ntp", "kind: bico\n    mask: {rat: 1}", ["mine.yaml:9: objectives.0.mask.rat", "'rate'"]),
        ("facts: all", "facts: all\n      store: x", ["exactly one of 'store', 'files', 'facts'"]),
        (
            "facts: all",
            "facts: all\n      text_field: x",
            ["mine.yaml:6: data.sources.0", "['text_field'] set how 'files'"],
        ),
        (
            "facts: all",
            "store: x\n      add_eos: false",
            ["mine.yaml:6: data.sources.0", "['add_eos'] set how texts are tokenized; a store has"],
        ),
        (
            "facts: all",
            "files: [x]\n      text_field: x\n      messages_field: y",
            ["mine.yaml:6: data.sources.0", "'text_field' excludes 'prompt_field' and 'messages_field'"],
        ),
        ("facts: all", "facts: [", ["not valid YAML", "mine.yaml:"]),
        ("model:", "extends: nowhere\nmodel:", ["mine.yaml:2: extends:", "'nowhere'"]),
        (
            "  config: {model_type: llama, rms_norm_eps: 1e-5}",
            "  dtype: bf16",
            ["model:", "'path'", "'config'"],
        ),
    ],
)
def test_a_mistake_is_named_with_key_file_and_line(recipe_file, old, new, expected):
    message = error_of(recipe_file(MINIMAL.replace(old, new, 1)))
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizr.lr=1", "--set optimizr.lr=1: optimizr: unknown key (did you mean 'optimizer'?)"),
        ("seed", "expected key.path=value"),
        ("objectives.4.kind=ntp", "indices 0 to 1"),
        ("schedule={name: constant, min_lr_ratio: 0.1}", "'min_lr_ratio' is where a decay ends"),
        (
            "objectives=[{kind: bico, mask: {rate: 2}}]",
            "--set objectives=[{kind: bico, mask: {rate: 2}}]: objectives.0.mask.rate:",
        ),
        ("seed.x=1", "is a single value"),
        ("optimizer.lr=fast", "--set optimizer.lr=fast: optimizer.lr:"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override, expected):
    assert expected in error_of("tiny_bico", override)


def test_a_circle_of_extends_is_named(recipe_file):
    recipe_file("extends: b\n", "a")
    recipe_file("extends: a\n", "b")
    assert "in a circle" in error_of(recipe_file("extends: a\n", "c"))


def test_a_misspelt_recipe_name_gets_a_suggestion():
    assert "did you mean 'tiny_bico'" in error_of("tiny_bica")


def test_the_configuration_imports_neither_torch_nor_deepspeed():
    import subprocess
    import sys

    code = "import sys, bico_ds.config.load; sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("written", ["off", "'off'", "warn", "stop"])
def test_the_word_off_is_a_choice_although_yaml_takes_it_for_false(tmp_path, written):
    chosen = written.strip("'")
    assert load_recipe("tiny_base", [f"training.on_spike={written}"]).training.on_spike == chosen
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: tiny_base\ntraining: {{on_spike: {written}}}\n")
    assert load_recipe(str(file)).training.on_spike == chosen
    file.write_text(dump_recipe(load_recipe(str(file))))
    assert load_recipe(str(file)).training.on_spike == chosen
