"""Explain a key of the recipe: what it does, its default and range, and where a recipe sets it.

    bico-ds explain                                    the sections
    bico-ds explain optimizer                          the keys of one
    bico-ds explain objectives.bico.mask.rate          one key
    bico-ds explain optimizer.lr --recipe tiny_bico    and its value there, with the file and line that set it

docs/recipe.md has all keys on one page, and says how an editor knows them, too.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from bico_ds.common.command_line import Command
from bico_ds.common.secrets import without_secrets
from bico_ds.common.yaml_files import KeyPath, MappingFile, dump_yaml
from bico_ds.config.arguments import add_recipe_options
from bico_ds.config.layers import named_key, path_parts, value_at
from bico_ds.config.load import read_recipe, recorded_values
from bico_ds.config.reference.json_schema import recipe_schema
from bico_ds.config.reference.keys import ANY, Key, example_file, find, recipe_keys
from bico_ds.config.reference.page import reference_page
from bico_ds.config.reference.values import Free, alternatives, bounds
from bico_ds.config.reference.words import in_words, inline, sentence

WIDTH = 100


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key, or a section (default: all sections)")
    add_recipe_options(parser, required=False)
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument("--json-schema", action="store_true", help="the JSON Schema of recipes, for editors")
    whole.add_argument("--markdown", action="store_true", help="all keys as one page (docs/recipe.md)")


def contradiction(options: Namespace) -> str | None:
    if options.key is not None and (options.json_schema or options.markdown):
        return "--json-schema and --markdown are of all keys: leave KEY out"
    if options.overrides and options.recipe is None:
        return "--set changes a recipe: give --recipe too"
    return None


@dataclass(frozen=True)
class _Written:
    """A recipe, as it is written and as it is read."""

    name: str
    tree: MappingFile
    values: dict[str, Any]

    def value(self, key: KeyPath) -> Any:
        """The value of a key, secrets left out; of `replay`, which is a data source once it is read, as it is written."""
        value = value_at(key, self.values)
        return value_at(key, without_secrets(self.tree.values)) if value is None else value

    def set_by(self, key: KeyPath) -> str:
        """The file and line, or `--set`, that gives a key its value."""
        origins = self.tree.origins
        own = [origins[key]] if key in origins else []
        below = [origin for other, origin in origins.items() if other[: len(key)] == key]
        return ", ".join(dict.fromkeys(map(str, own or below))) or "the default"


def run(options: Namespace) -> None:
    written = None
    if options.recipe is not None:
        recipe, tree = read_recipe(options.recipe, options.overrides)  # with its own objectives, by `imports`
        written = _Written(options.recipe, tree, recorded_values(recipe))
    if options.json_schema:
        print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
    elif options.markdown:
        print(reference_page(), end="")
    else:
        console = Console(
            width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False, emoji=False
        )
        _explain(options.key, written, console)


def _explain(asked: str | None, written: _Written | None, console: Console) -> None:
    keys = recipe_keys()
    if asked is None:
        _print_keys([key for key in keys if len(key.path) == 1], console)
        console.print("\nA section or a key: bico-ds explain optimizer, bico-ds explain optimizer.lr")
        return
    place: KeyPath = tuple(path_parts(asked, "KEY"))
    if written is not None:
        place = named_key(written.tree, asked, "KEY")
    key = find(keys, _as_described(place, written))
    console.print(asked)
    console.print(Padding(sentence(key.description), (0, 0, 1, 2)))
    _print_table(_facts(key, place, written, keys), console)
    below = [other for other in keys if other.path[:-1] == key.path]
    if written is None or any(other.is_entry for other in below):
        _print_keys(_without_the_only_entry(below, keys), console)
    else:
        _print_values(below, place, written, console)


def _as_described(place: KeyPath, written: _Written | None) -> list[str]:
    """The words by which the reference knows a key of a recipe: an entry of a list is of its kind, or any."""
    words = []
    for end, part in enumerate(place, start=1):
        if isinstance(part, int):
            entry = value_at(place[:end], written.tree.values) if written is not None else None
            kind = entry.get("kind") if isinstance(entry, dict) else None
            part = kind if isinstance(kind, str) else ANY
        words.append(part)
    return words


def _facts(
    key: Key, place: KeyPath, written: _Written | None, keys: Sequence[Key]
) -> Iterator[tuple[str, str]]:
    if Free() in alternatives(key.value) and len(place) > len(key.path):
        yield "part of", f"{key.name}, {in_words(key.value)}"
    else:
        yield "value", "\n".join([in_words(key.value), *(f"({bound.why})" for bound in bounds(key.value))])
        if key.default_in_words:
            yield "default", key.default_in_words
        if key.example is not None:
            assignment = f"{key.name}={inline(key.example)}"
            yield "example", f"--set {shlex.quote(assignment)}"
            yield "", dump_yaml(example_file(key, keys)).rstrip()
    if written is not None and not key.has_keys:
        yield f"in {written.name}", f"{inline(written.value(place))}   ({written.set_by(place)})"


def _without_the_only_entry(below: list[Key], keys: Sequence[Key]) -> list[Key]:
    """Of a list whose entries are all alike, the keys of an entry."""
    if len(below) != 1 or below[0].path[-1] != ANY:
        return below
    return [key for key in keys if key.path[:-1] == below[0].path]


def _print_keys(keys: Sequence[Key], console: Console) -> None:
    _print_table(((key.path[-1], key.default_in_words, sentence(key.description)) for key in keys), console)


def _print_values(keys: Sequence[Key], place: KeyPath, written: _Written, console: Console) -> None:
    for key in keys:
        here = (*place, key.path[-1])
        value = "" if key.has_keys and written.value(here) else f" {inline(written.value(here))}"
        console.print(Padding(f"{key.path[-1]}:{value}   ({written.set_by(here)})", (0, 0, 0, 2)))
        console.print(Padding(sentence(key.description), (0, 0, 0, 6)))


def _print_table(rows: Iterable[tuple[str, ...]], console: Console) -> None:
    """Columns, of which the first is never cut."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    cells = list(rows)
    for row in cells:
        table.add_row(*row)
    if cells:
        console.print(table)


main = Command(
    description=__doc__,
    add_options=add_options,
    run=run,
    contradiction=contradiction,
    only_shows=lambda options: True,
)


if __name__ == "__main__":
    main.start()
