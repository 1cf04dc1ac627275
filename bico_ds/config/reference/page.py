"""The reference as a page: docs/recipe.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bico_ds.config.reference.keys import ANY, Key, Path, recipe_keys
from bico_ds.config.reference.values import bounds, groups
from bico_ds.config.reference.words import in_words, inline, sentence

_HEAD = """# Recipe: every key, what it does, its default and range

```bash
bico-ds explain optimizer.lr                       # one key; of a section (`optimizer`) its keys; without a key the sections
bico-ds explain optimizer.lr --recipe tiny_bico    # also its value in a recipe, and the file and line that set it
```

A recipe is one YAML file of these keys ([how to write one](run.md#recipes-and-overrides)). Each may be left out but those
that are *required*, and these too in a recipe that `extends` another one which has them. `--set optimizer.lr=1e-5` sets a
key on the command line. A *section* is a mapping of keys, indented below its name; in a list of sections each entry is one.
`null` stands for nothing. This page is written by `bico-ds explain --markdown`.

**In an editor.** With the YAML language server (in VS Code the extension YAML by Red Hat) a first line in your recipe,

```yaml
# yaml-language-server: $schema=../recipes/recipe.schema.json
```

shows what a key does while you write, completes it, and underlines misspelled ones. The path begins at the recipe;
`bico-ds explain --json-schema` prints the file, with `--recipe` also for the objectives that a recipe `imports`.
"""


def reference_page() -> str:
    """Return the page as Markdown."""
    keys = recipe_keys()
    sections = [key for key in keys if key.has_keys]
    contents = " · ".join(f"[{key.name}](#{_anchor(key)})" for key in sections if len(key.path) == 1)
    parts = [_HEAD, f"**Sections:** {contents}", "## The whole recipe", *_table(keys, ())]
    for key in sections:
        if _below(key, keys) or len(key.path) == 1:
            depth = "#" * min(len([part for part in key.path if part != ANY]) + 1, 4)
            parts += [f"{depth} {_title(key)}", sentence(key.description), *_table(keys, key.path)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _below(key: Key, keys: Sequence[Key]) -> list[Key]:
    return [other for other in keys if other.path[:-1] == key.path and not other.is_entry]


def _title(key: Key) -> str:
    """As the key is written; of an entry of a list, which one."""
    names = [part for part in key.path if part != ANY]
    return ".".join(names) + (": each entry" if key.path[-1] == ANY else "")


def _anchor(key: Key) -> str:
    return re.sub(r"[^\w\- ]", "", _title(key).lower()).replace(" ", "-")


def _table(keys: Sequence[Key], path: Path) -> Iterator[str]:
    rows = [key for key in keys if key.path[:-1] == path and not key.is_entry]
    if not rows:  # a list whose entries have tables of their own
        return
    lines = ["| key | default | value | what it does |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cells(key, keys))} |" for key in rows]
    yield "\n".join(lines)


def _cells(key: Key, keys: Sequence[Key]) -> Iterator[str]:
    yield _code(key.path[-1])
    default = key.default_in_words
    yield _code(default) if default and not key.has_no_default else default
    yield _cell(in_words(key.value)) + _reasons(key)
    if links := [f"[{_title(inner)}](#{_anchor(inner)})" for inner in _linked(key, keys)]:
        yield f"{_cell(sentence(key.description))}<br>Keys: {', '.join(links)}"
    else:
        example = _code(f"{key.path[-1]}: {inline(key.example)}")
        yield f"{_cell(sentence(key.description))}<br>Example: {example}"


def _reasons(key: Key) -> str:
    return "".join(f"<br>({_cell(bound.why)})" for bound in bounds(key.value))


def _linked(key: Key, keys: Sequence[Key]) -> list[Key]:
    """Where the keys of a section, or of the entries of a list, stand."""
    if not groups(key.value):
        return []
    entries = [other for other in keys if other.path[:-1] == key.path and other.is_entry]
    return entries or [key]


def _cell(text: str) -> str:
    """In one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """As it is written, in a cell; GitHub parts cells before it looks for code."""
    return "`" + text.replace("|", "\\|") + "`"
