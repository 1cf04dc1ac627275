"""Overrides that name entries of lists, keys that collide with inherited ones, and recipes that nobody meant to write."""

from __future__ import annotations

import contextlib
import random

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from tests.config.damaged_recipes import damaged_override, damaged_recipe, shipped_texts
from tests.config.mistakes import error_of
from tests.cpu_time import cpu_seconds_below

BASE = """\
model:
  config: {model_type: llama}
data:
  sources:
    - facts: all
    - {name: books, store: /stores/a.b}
objectives:
  - kind: ntp
    probability: 0.5
  - kind: bico
    probability: 0.5
training:
  epochs: 2
schedule: {name: warmup_stable_decay, decay_steps: 3}
"""


@pytest.mark.parametrize("path", ["objectives.1", "objectives[1]", "objectives.bico", "objectives[bico]"])
def test_an_entry_of_a_list_is_named_by_index_or_kind(path):
    recipe = load_recipe("tiny_bico", [f"{path}.mask.rate=0.3"])
    assert recipe.objectives[1].mask.rate == 0.3


@pytest.mark.parametrize("path", ["data.sources[1]", "data.sources.books", "data[sources][books]"])
def test_a_data_source_is_named_by_its_name(recipe_file, path):
    recipe = load_recipe(recipe_file(BASE), [f"{path}.epochs=3", "data.sources.facts_all.epochs=2"])
    assert [source.epochs for source in recipe.data.sources] == [2, 3]


def test_an_entry_is_added_to_a_list_inside_of_a_list(recipe_file):
    recipe = load_recipe(
        recipe_file(BASE), ["objectives.0.sources=[books]", "objectives[0].sources+=facts_all"]
    )
    assert recipe.objectives[0].sources == ["books", "facts_all"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectives.7.probability=1", "indices 0 to 1: 0 is ntp, 1 is bico"),
        ("objectives.-1.probability=1", "indices 0 to 1: 0 is ntp, 1 is bico"),
        ("objectives.bica.probability=1", "indices 0 to 1: 0 is ntp, 1 is bico"),
        ("data.sources.none.epochs=1", "0 is facts_all, 1 is books"),
        (f"objectives.{'9' * 5000}.probability=1", "indices 0 to 1"),
        ("imports.0.a=1", "'imports.0' is a single value"),
        ("²=1", "²: unknown key"),
        ("objectives.²=1", "indices 0 to 1"),
        ("objectives.０=1", "indices 0 to 1"),
        ("a..b=1", "expected key.path=value"),
        (".=1", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("+=1", "expected key.path=value"),
        ("objectives[1=1", "expected key.path=value"),
        ("objectives[]=1", "expected key.path=value"),
        ("seed+=1", "there is no list 'seed' to add to"),
        ("a.b.c+=1", "there is no list 'a.b.c' to add to"),
        ("seed=*y", "not valid YAML: found undefined alias"),
        ("objectives=[{kind: ntp}", "not valid YAML"),
        ("optimizer={lr: 1, lr: 2}", "key 'lr' is given twice"),
        ("seed=&x [*x]", "an alias"),
        ("seed=!!python/name:os.system", "none of the values here"),
        ("seed=1:20", "must be a number, found '1:20'"),
        (f"seed={'9' * 5000}", "a number of 5,000 digits"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_one_short_error(recipe_file, override, words):
    message = error_of(recipe_file(BASE + "imports: [os]\n"), override)
    assert message.startswith("--set ") and words in message and len(message) < 700


def test_a_kind_that_two_entries_have_names_none_of_them(recipe_file):
    path = recipe_file(BASE.replace("kind: ntp", "kind: bico"))
    assert "2 of its entries are 'bico'" in error_of(path, "objectives.bico.probability=1")


@pytest.mark.parametrize(
    ("top", "words"),
    [
        (
            "training: {steps: 40}",
            ["'steps' is from TOP:2", "'epochs' is from BASE:13", "write 'epochs: null'"],
        ),
        ("schedule: {name: cosine}", ["'decay_steps' is from BASE:14", "write 'decay_steps: null'"]),
        ("replay: {tokens: 5, store: x}", []),
    ],
)
def test_a_collision_with_an_inherited_key_names_the_files_and_the_way_out(recipe_file, top, words):
    base = recipe_file(BASE, "base")
    path = recipe_file(f"extends: base\n{top}\n", "top")
    message = error_of(path)
    for word in words:
        assert word.replace("TOP", path).replace("BASE", base) in message
    assert ("is from" in message) is bool(words)
    if "steps: 40" in top:
        recipe_file("extends: base\ntraining: {steps: 40, epochs: null}\n", "top")
        assert load_recipe(path).training.steps == 40


@pytest.mark.parametrize(
    ("override", "null"),
    [("training.steps=40", "training.epochs"), ("data.sources.0.store=x", "data.sources.0.facts")],
)
def test_an_override_that_collides_says_how_to_do_without_the_other(recipe_file, override, null):
    path = recipe_file(BASE)
    assert f"write --set {null}=null" in error_of(path, override)
    assert load_recipe(path, [override, f"{null}=null"])


def test_a_long_chain_of_recipes_ends_in_one_error(recipe_file):
    for number in range(300):
        path = recipe_file(f"extends: link{number + 1}\n", f"link{number}")
    assert "more than 20 recipes extend each other" in error_of(path.replace("link299", "link0"))


@pytest.mark.parametrize("name", ["a" * 5000, "/" * 5000, "a\0b", "/etc/passwd/a", "/dev/zero", "/"])
def test_a_name_that_no_recipe_has_is_one_error_wherever_it_stands(recipe_file, name):
    assert len(error_of(name)) < 500
    path = recipe_file("extends: " + repr(name).replace("'", '"') + "\n" + BASE)
    message = error_of(path)
    assert message.startswith(f"{path}:1: extends: ") and len(message) < 700


@pytest.mark.parametrize(
    "key", ["output_dir", "imports", "deepspeed.config", "model.path", "model.tokenizer"]
)
@pytest.mark.parametrize("text", ["a" * 5000, "b/" * 3000, "a\\0b", "a\\nb", "a\\e[2Jb", "  "])
def test_what_can_be_no_path_is_refused_where_it_is_written(recipe_file, key, text):
    value = f'["{text}"]' if key == "imports" else f'"{text}"'
    message = error_of(recipe_file(BASE), f"{key}={value}")
    assert f": {key}" in message and message.isprintable() and len(message) < 500


def test_many_mistakes_are_told_of_without_end_and_within_a_second(recipe_file):
    path = recipe_file(BASE + "optimizer:\n" + "".join(f"  a{n}: 1\n" for n in range(2000)))
    with cpu_seconds_below(1):
        message = error_of(path)
    assert "… and 1,980 more" in message and len(message) < 4000


@pytest.mark.parametrize("kind", ["recipe", "override"])
def test_a_damaged_recipe_is_read_or_refused_and_nothing_else(recipe_file, tmp_path, kind):
    drawn = random.Random(random.getrandbits(32))
    texts, path = shipped_texts(), tmp_path / "mine.yaml"
    for _ in range(100):
        words = []
        if kind == "recipe":
            path.write_bytes(damaged_recipe(texts, drawn))
        else:
            words = [damaged_override(drawn)]
        with cpu_seconds_below(1, words), contextlib.suppress(UserError):
            load_recipe(str(path) if kind == "recipe" else "tiny_bico", words)
