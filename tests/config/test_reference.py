"""The reference of a recipe's keys has all of them, and says of each what the loader does with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import KeyPath, dump_yaml, read_mapping, read_value
from bico_ds.config.bounds import Bound
from bico_ds.config.layers import leaves, value_at
from bico_ds.config.load import list_recipes, load_recipe, recorded_values
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS
from bico_ds.config.paths import FolderOrHubName, LocalPath, WrittenPath
from bico_ds.config.reference.keys import ANY, Key, example_file, find
from bico_ds.config.reference.values import Group, groups, value_of
from bico_ds.config.reference.words import in_words, inline
from bico_ds.config.schema import Recipe
from bico_ds.config.section import PositiveInt, Section
from tests.config.reference_keys import KEYS, PLAIN, annotation, by_name

ENTRIES = {key.path for key in KEYS if key.is_entry}


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    """Every section of the package, whatever names it."""
    for section in base.__subclasses__():
        if is_ours(section):
            yield section
        yield from sections(section)


def is_ours(section: type[Section]) -> bool:
    """Other tests have objectives of their own."""
    return section.__module__.startswith("bico_ds.")


def test_every_key_says_what_it_does():
    assert not [key.name for key in KEYS if len(key.description.split()) < 2]


def test_the_reference_has_the_keys_of_every_section():
    """Found by another way than the walk: as subclasses. `ObjectiveSpec` stands for its kinds."""
    names = {key.path[-1] for key in KEYS}
    missing = {f"{s.__name__}.{name}" for s in sections() for name in s.model_fields if name not in names}
    assert not missing
    walked = {inner.section for key in KEYS for inner in groups(key.value)} | {Recipe}
    assert {section for section in walked if is_ours(section)} == set(sections()) - {ObjectiveSpec}


@pytest.mark.parametrize("name", list_recipes())
def test_the_reference_has_every_key_of_a_resolved_recipe(name):
    values = recorded_values(load_recipe(name))
    for leaf in leaves(values):
        key = find(KEYS, [by_kind(leaf.key[: end + 1], values) for end in range(len(leaf.key))])
        assert key.path[-1] == leaf.key[-1] or key.path in (("model", "config"), ("deepspeed", "overrides"))


def by_kind(place: KeyPath, values: Any) -> str:
    """The last word of a key as the reference has it."""
    entry = value_at(place, values)
    return (
        entry.get("kind", ANY) if isinstance(place[-1], int) and isinstance(entry, dict) else str(place[-1])
    )


def first_place(key: Key) -> KeyPath:
    """Where the key stands in a recipe whose lists have one entry each."""
    return tuple(0 if key.path[:end] in ENTRIES else key.path[end - 1] for end in range(1, len(key.path) + 1))


FULL = """
model: {path: models/mine, lora: {}}
data: {sources: [{facts: all}]}
objectives: [OBJECTIVE]
retention: {kl: 1, teacher: stores/teacher, on: [other]}
training: {steps: 10}
monitor: {wandb: {project: mine}}
evaluation: {tasks: [{kind: text, name: wiki, file: wiki.txt}], every_steps: 5}
checkpoint: {keep_best: {metric: text/wiki/perplexity, mode: min}}
"""


@pytest.mark.parametrize("kind", [kind for kind, known in KINDS.items() if is_ours(known.spec)])
def test_a_default_is_what_the_loader_fills_in(kind, recipe_file):
    """Of every key that this recipe leaves out; sections that are null where nobody writes them are written."""
    mine, other = f"{{kind: {kind}, probability: 0.5, sources: [facts_all]}}", "{kind: ntp, probability: 0.5}"
    text = FULL.replace("OBJECTIVE", f"{mine}, {other}").replace(
        "{facts: all}", "{facts: all}, {store: other}"
    )
    path = recipe_file(text)
    written, filled = read_mapping(path, "").values, recorded_values(load_recipe(path))
    compared = 0
    for key in PLAIN:
        place = first_place(key)
        of_others = any(by_kind(place[:end], written) != key.path[end - 1] for end in range(1, len(place)))
        # `replay` is a data source once it is read; the loader names a recipe
        if of_others or value_at(place, written) is not None or key.path[0] in ("replay", "name"):
            continue
        assert not key.is_required, key.name
        assert value_at(place, filled) == key.default, key.name
        compared += 1
    assert compared > 70


@pytest.mark.parametrize("key", PLAIN, ids=by_name)
def test_an_example_is_a_value_that_the_key_may_have(key):
    assert key.example is not None
    TypeAdapter(annotation(key)).validate_python(key.example)


@pytest.mark.parametrize("key", [key for key in KEYS if key.example is not None], ids=by_name)
def test_the_example_as_a_file_gives_the_key_this_value(key, recipe_file):
    path = recipe_file(dump_yaml(example_file(key, KEYS)))
    assert value_at(first_place(key), read_mapping(path, "").values) == key.example


class Inner(Section):
    """Inner keys."""

    kind: Literal["inner"] = "inner"


class Outer(Section):
    """Every kind of value that a key may have."""

    flag: bool = False
    whole: Annotated[int, Bound(least=2, most=10_000, why="…")] = 3
    open: Annotated[float, Bound(above=0, below=1, why="…")] = 0.5
    endless: Annotated[float, Bound(least=1, or_infinite=True, why="…")] = 1.0
    limit: PositiveInt | None = None
    text: str = ""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=9)] = "a"
    code: Annotated[str, Field(pattern="^x$")] = "x"
    path: LocalPath | None = None
    model: FolderOrHubName | None = None
    module: list[WrittenPath] = Field(default_factory=list)
    word: Literal["a", "b", "c"] = "a"
    pair: tuple[float, float] = (1.0, 2.0)
    names: Annotated[list[str], Field(min_length=1)] | None = None
    mixed: list[str | Inner] = Field(default_factory=list)
    inner: Inner = Inner()
    free: dict[str, Any] = Field(default_factory=dict)
    strange: set[int] = Field(default_factory=set)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flag", "true or false"),
        ("whole", "whole number from 2 to 10,000"),
        ("open", "number above 0 to below 1"),
        ("endless", "number from 1, or .inf"),
        ("limit", "whole number from 1 to 1,000,000,000,000, or null"),
        ("text", "text"),
        (
            "name",
            "text of letters, digits, '.', '_' and '-', the first a letter or digit, at most 9 characters",
        ),
        ("code", "text matching ^x$"),
        ("path", "path, or null"),
        ("model", "folder or hub name, or null"),
        ("module", "list of modules or paths"),
        ("word", "a, b or c"),
        ("pair", "list of 2 numbers"),
        ("names", "list of texts (not empty), or null"),
        ("mixed", "list of texts or sections"),
        ("inner", "section"),
        ("free", "mapping of any keys"),
        ("strange", "any value"),
    ],
)
def test_a_value_is_told_in_words_of_no_language(name, words):
    assert in_words(value_of(Outer.model_fields[name])) == words


def test_the_defaults_of_a_section_are_those_of_the_key_that_holds_it():
    mask = next(key for key in KEYS if key.path == ("objectives", "masked_ft", "mask"))
    assert isinstance(mask.value, Group)
    rates = {kind: find(KEYS, ["objectives", kind, "mask", "rate"]).default for kind in ("bico", "masked_ft")}
    assert rates == {"bico": 0.15, "masked_ft": [0.0, 1.0]}


def drawn(random: random.Random, depth: int = 2) -> Any:
    letters = "ab :,[]{}#&*!|>'\"%@`-?\\\n\té0.1eE~=<_"
    text = "".join(random.choices(letters, k=random.randint(0, 6)))
    word = random.choice(
        ["null", "true", "off", "1e-5", "2024-01-01", "1:20", "~", "0x1F", "<<", "- a", text, text]
    )
    number = random.choice([random.uniform(-1e3, 1e3), random.random() * 10.0 ** random.randint(-30, 30)])
    plain = [None, True, False, random.randint(-(2**70), 2**70), number, float("inf"), word, text]
    if depth and random.random() < 0.4:
        parts = [drawn(random, depth - 1) for _ in range(random.randint(0, 3))]
        return parts if random.random() < 0.5 else {f"k{word}{i}": part for i, part in enumerate(parts)}
    return random.choice(plain)


def test_a_value_in_one_line_is_read_as_itself():
    for _ in range(2000):
        value = drawn(random)  # type: ignore[arg-type]
        assert "\n" not in inline(value)
        assert read_value(inline(value), "here") == value
        assert read_value(f"[{inline(value)}]", "here") == [value]


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("optimizer", ("optimizer",)),
        ("optimizer.lr", ("optimizer", "lr")),
        ("data.sources", ("data", "sources")),
        ("data.sources.store", ("data", "sources", ANY, "store")),
        ("data.sources.0.store", ("data", "sources", ANY, "store")),
        ("data.sources.mine.store", ("data", "sources", ANY, "store")),
        ("data.sources.name", ("data", "sources", ANY, "name")),
        ("data.sources.name.name", ("data", "sources", ANY, "name")),
        ("objectives.bico.mask.rate", ("objectives", "bico", "mask", "rate")),
        ("evaluation.tasks.text.window", ("evaluation", "tasks", "text", "window")),
        ("deepspeed.overrides.zero_optimization.stage", ("deepspeed", "overrides")),
        ("model.config.hidden_size", ("model", "config")),
    ],
)
def test_a_key_is_found_by_the_words_of_a_user(asked, path):
    assert find(KEYS, asked.split(".")).path == path


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("optimiser.lr", r"there is no key 'optimiser\.lr' \(did you mean 'optimizer\.lr'\?\)"),
        ("lr", r"no key 'lr' \(there is optimizer\.lr\)"),
        ("rate", r"\(there is objectives\.bico\.mask\.rate, objectives\.abi\.mask\.rate, objectives\.masked"),
        ("every_steps", r"there is checkpoint\.every_steps, evaluation\.every_steps, monitor\.every_steps\)"),
        ("optimizer.lr.x", r"no key 'optimizer\.lr\.x'"),
        ("objectives.1.mask.rate", r"an entry of this list is named by its kind: ntp, bico, abi"),
        ("objectives.bico.spans", r"no key 'objectives\.bico\.spans' \(did you mean"),
        ("x" * 5000, r"no key 'x{90,100}…?'"),
        ("nothing", r"no key 'nothing'; `bico-ds explain` lists the sections"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(asked, message):
    with pytest.raises(UserError, match=message):
        find(KEYS, asked.split("."))
