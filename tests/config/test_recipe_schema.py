"""The JSON Schema of recipes takes what the loader takes, and refuses what it refuses, key by key."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import read_mapping, read_value
from bico_ds.config.load import load_recipe
from bico_ds.config.reference.json_schema import recipe_schema
from bico_ds.config.reference.keys import ANY, Key, example_file
from bico_ds.config.reference.values import Flag, Number, alternatives, bounds
from bico_ds.config.resources import RECIPES
from tests import ROOT
from tests.config.reference_keys import KEYS, PLAIN, annotation, by_name

jsonschema = pytest.importorskip("jsonschema", reason="validates as editors do: pip install -e .[dev]")

SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
FILES = sorted(
    [*RECIPES.glob("*.yaml"), *(ROOT / "docs").rglob("recipe.yaml"), *(ROOT / "tests").rglob("*.yaml")]
)


def errors(values: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(values)]


def test_it_is_a_schema():
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_fits(file):
    assert not errors(read_mapping(file, "").values)


@pytest.mark.parametrize("key", [key for key in KEYS if key.example is not None], ids=by_name)
def test_an_example_fits_and_beside_it_a_misspelled_key_does_not(key):
    values = example_file(key, KEYS)
    assert not errors(values)
    damaged = copy.deepcopy(values)
    holder: Any = damaged
    for part in key.path[:-1]:
        holder = holder.get(part, holder) if isinstance(holder, dict) else holder[0]
        holder = holder[0] if isinstance(holder, list) else holder
    holder[f"{key.path[-1]}x"] = holder[key.path[-1]]
    assert errors(damaged)


def schema_of(key: Key) -> dict[str, Any]:
    node: Any = SCHEMA
    for part in key.path:
        if part == ANY:
            continue
        parts = [node, *node.get("anyOf", [])]
        inner = [entry for each in parts for entry in (each, each.get("items", {}))]
        inner += [entry for each in inner for entry in each.get("anyOf", [])]
        mappings = [entry["properties"] for entry in inner if "properties" in entry]
        chosen = [m for m in mappings if m.get("kind", {}).get("enum") == [part]] or None
        node = {"properties": chosen[0]} if chosen else next(m[part] for m in mappings if part in m)
    return node


PROBES = [
    None, 0, 1, -1, 2, 3, 0.5, 1.5, 5.0, 2**70, -(2**70), "", "text", "1", "a b", [], [1, 2], [0.5, 0.6], ["a"], [1],
    [1, 2, 3], ["a", "b"], [True, False], {}, {"a": 1}, True, False,
]  # fmt: skip
FLAGS = [True, False, None, 2, "text", "", [], {}]  # the loader also takes `yes` and 1 for true
UNLIKE = {"data.sources.0.name": ""}  # names that no folder can have are refused by the loader alone


@pytest.mark.parametrize("key", PLAIN, ids=by_name)
def test_a_value_fits_exactly_where_the_loader_takes_it(key):
    loader, schema = TypeAdapter(annotation(key)), jsonschema.Draft7Validator(schema_of(key))
    is_number = any(isinstance(part, Number) for part in alternatives(key.value))
    edges = [b for bound in bounds(key.value) for b in (bound.least, bound.above, bound.most, bound.below)]
    near = [edge + step for edge in edges if edge is not None for step in (0, -1, 1)] if is_number else []
    for value in FLAGS if Flag() in alternatives(key.value) else [*PROBES, *near, key.example, key.default]:
        try:
            loader.validate_python(value)
            taken = True
        except ValidationError:
            taken = False
        if UNLIKE.get(key.name) != value or isinstance(value, bool):
            assert schema.is_valid(value) == taken, value


@pytest.mark.parametrize(
    "text",
    [
        "{extends: tiny_bico, 'data.sources+': x}",
        "{extends: tiny_bico, extend: x}",
        "{extends: [tiny_bico]}",
        "{objectives: [{probability: 0.5}]}",
        "{objectives: [{kind: bcio}]}",
        "{objectives: [{kind: ntp, mask: {rate: 0.5}}]}",
        "{objectives: [{kind: bico, mask: {rat: 0.5}}]}",
        "{data: {'capacity+': 3}}",
        "{data: {sources: [{store: a, 'files+': [b]}]}}",
        "{training: {on_spike: never}}",
        "{retention: {klx: 1}}",
        "{evaluation: {tasks: [3]}}",
        "{evaluation: {tasks: [{kind: txt, name: a, file: b}]}}",
        "{evaluation: {tasks: [{kind: text, file: b}]}}",
        "{optimizer: }",
    ],
)
def test_what_the_loader_refuses_is_refused(text, recipe_file):
    values = read_value(text, "here")
    assert errors(values)
    if isinstance(values, dict):
        with pytest.raises(UserError):
            load_recipe(recipe_file(json.dumps({"extends": "tiny_bico", **values})))


@pytest.mark.parametrize(
    "text",
    [
        "{extends: tiny_bico}",
        "{extends: tiny_bico, training: {steps: null, epochs: 2}}",
        "{extends: tiny_bico, retention: null}",
        "{extends: tiny_bico, training: {on_spike: off}}",
        "{extends: tiny_bico, data: {'sources+': {facts: both_orders}}}",
        "{extends: tiny_bico, data: {'sources+': [{facts: both_orders}]}}",
        "{extends: tiny_bico, evaluation: {'tasks+': {kind: text, name: a, file: b}}}",
        "{extends: tiny_bico, deepspeed: {overrides: {zero_optimization: {overlap_comm: false}}}}",
        "{extends: tiny_bico, model: {config: {vocab_size: 300}}}",
    ],
)
def test_parts_of_a_recipe_fit_as_the_loader_takes_them(text, recipe_file):
    assert not errors(read_value(text, "here"))
    load_recipe(recipe_file(text))
