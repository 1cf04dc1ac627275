"""A grid over a recipe: its values, its combinations, and the names of their folders."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import read_value
from bico_ds.config.grid import MOST_RUNS, parse_axis, points
from bico_ds.config.load import load_recipe

SAFE = re.compile(r"[A-Za-z0-9._=+-]+")


def names(*axes: str, recipe: str = "r") -> list[str]:
    return [point.name_of_run(recipe) for point in points([parse_axis(axis) for axis in axes])]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.lr=1e-5,2e-5", (1e-5, 2e-5)),
        ("seed=1, 2 ,3", (1, 2, 3)),
        ("name=a", ("a",)),
        ("data.sources=[{store: a}, {store: b}]", ([{"store": "a"}, {"store": "b"}],)),
        ("x=[1,2],[3]", ([1, 2], [3])),
        ("x={a: 1, b: 2},{a: 3}", ({"a": 1, "b": 2}, {"a": 3})),
        ("x='1,2',3", ("1,2", 3)),
        ("x=true,1,null,'true'", (True, 1, None, "true")),
    ],
)
def test_values_are_yaml_and_commas_within_brackets_and_quotes_part_nothing(text, values):
    read = parse_axis(text).values
    assert read == values and list(map(type, read)) == list(map(type, values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", r"'seed': expected key\.path=value"),
        ("=1", "expected key"),
        ("seed=", "expected key"),
        ("seed=1,", "'seed=1,': a value is missing behind the last comma"),
        ("seed=1,,2", "'seed=1,,2': not valid YAML"),
        ("seed=1],[2", "not valid YAML"),
        ("x={a: 1", "not valid YAML"),
        ("seed=1,1", "1 is given twice"),
        ("optimizer.lr=1e-5,0.00001", "1e-05 is given twice"),
        ("x=.inf", "inf is no number that a recipe can have"),
        ("x=!!python/none 1", "is none of the values here"),
        ("monitor.wandb.api_key=abc123", "a secret, which the names of folders would show"),
        ("model.path=hf_abcdefghijklmnopqrstuv", "a secret"),
    ],
)
def test_mistakes_are_told_with_what_was_written(text, message):
    with pytest.raises(UserError, match=message) as told:
        parse_axis(text)
    assert "abc123" not in str(told.value) and "abcdefghij" not in str(told.value)


def test_all_combinations_come_and_the_last_key_changes_first():
    axes = [parse_axis(text) for text in ("optimizer.lr=1e-5,2e-5", "seed=1,2,3")]
    found = [point.values for point in points(axes)]
    assert found == [
        {"optimizer.lr": lr, "seed": seed} for lr, seed in itertools.product((1e-5, 2e-5), (1, 2, 3))
    ]


def test_a_key_that_is_given_twice_and_a_grid_beyond_all_measure_are_refused():
    for again in ("objectives.1.mask.rate=0.5", "objectives[1].mask.rate=0.5"):
        with pytest.raises(UserError, match="--grid .*: given twice; write all of its values behind one '='"):
            points([parse_axis("objectives.1.mask.rate=0.15"), parse_axis(again)])
    many = ",".join(map(str, range(100)))
    with pytest.raises(UserError, match=f"1,000,000 combinations are more than {MOST_RUNS:,}"):
        points([parse_axis(f"{key}={many}") for key in ("a", "b", "c")])


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        (["optimizer.lr=5e-6", "seed=1"], "r+lr=5e-6+seed=1"),
        (["optimizer.lr=1e20"], "r+lr=1e20"),
        (["objectives.1.mask.rate=0.15"], "r+rate=0.15"),
        (["objectives[1].mask.rate=0.15"], "r+rate=0.15"),
        (["seed=1", "data.facts.seed=2"], "r+seed=1+facts.seed=2"),
        (
            ["objectives.bico.mask.rate=0.1", "objectives.abi.mask.rate=0.2"],
            "r+bico.mask.rate=0.1+abi.mask.rate=0.2",
        ),
        (["model.lora=null"], "r+lora=null"),
        (["data.shuffle=false"], "r+shuffle=false"),
        (["x.y=-3"], "r+y=-3"),
        (["deepspeed.config=zero3_bf16"], "r+config=zero3_bf16"),
    ],
)
def test_a_name_is_what_a_reader_expects(axes, name):
    assert names(*axes) == [name]


def test_names_keep_to_safe_characters_and_lengths_and_tell_all_values_apart():
    texts = ["a/b", "a-b", "a b", "'1'", "1", "'true'", "true", "null", "'null'", "''", "é", "..", "[1, 2]", "[1]", "{a: 1}",
             "a:b", "-", "x" * 50, "x" * 51, "'a,b'", "a+b", "a=b"]  # fmt: skip
    found = names("model.path=" + ",".join(texts))
    assert len(set(found)) == len(texts)
    long = names(*(f"section.{'k' * 20}{n}={'v' * 30}a,{'v' * 30}b" for n in range(6)))
    assert len(set(long)) == 64
    for name in (*found, *long):
        assert SAFE.fullmatch(name) and len(name) <= 120, name


def test_a_name_does_not_depend_on_the_other_values():
    few, more = names("optimizer.lr=1e-5", "seed=1"), names("optimizer.lr=1e-5,3e-5", "seed=2,1")
    assert set(few) < set(more)


def test_overrides_give_the_recipe_the_values_that_were_read():
    rates = [random.uniform(1e-9, 1) * 10 ** random.randint(-6, 0) for _ in range(20)]
    axes = [
        parse_axis(f"optimizer.lr={','.join(map(repr, rates))}"),
        parse_axis("data.sources+={store: 'a b'}"),
        parse_axis("description='1: x'"),
    ]
    for point in points(axes):
        recipe = load_recipe("tiny_bico", point.overrides)
        assert recipe.optimizer.lr in rates and recipe.optimizer.lr == point.values["optimizer.lr"]
        assert recipe.data.sources[-1].store.text == "a b"
        assert recipe.description == "1: x"
        for override, value in zip(point.overrides, point.values.values(), strict=True):
            assert read_value(override.partition("=")[2], "") == value
