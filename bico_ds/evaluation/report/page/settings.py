"""The section of settings: where the recipes of the runs differ, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bico_ds.common.printable import on_one_line
from bico_ds.common.yaml_files import dump_yaml
from bico_ds.evaluation.report.page.html import Html, code, details, element, section, table
from bico_ds.evaluation.report.page.numbers import amount, in_words
from bico_ds.evaluation.report.page.source import ReportedRun

_MOST_CHARACTERS = 200
_NOT_THERE = "–"


def settings(runs: Sequence[ReportedRun]) -> Html | None:
    """Every key in which recipes differ, and the recipes; None where no recipe is known."""
    known = [run for run in runs if run.recipe]
    if not known:
        return None
    recipes = [dict(leaves(run.recipe)) for run in known]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    differing = [key for key in keys if len({recipe.get(key, _NOT_THERE) for recipe in recipes}) > 1]
    same = amount(len(keys) - len(differing), "other key")
    rows = [(element("code", key), *(recipe.get(key, _NOT_THERE) for recipe in recipes)) for key in differing]
    labels = [run.label for run in known]
    body: list[Any]
    if len(known) == 1:
        body = [element("p", f"The recipe of {labels[0]}, every key but secrets.", class_="soft")]
    elif not rows:
        body = [element("p", f"The recipes of {in_words(labels)} are the same.", class_="soft")]
    else:
        words = "is the same" if same.startswith("1 ") else "are the same"
        caption = f"Keys that differ; {same} {words} in all"
        body = [table(caption, ("key", *labels), rows, words=labels, as_cards=True)]
    body += [
        details(f"The whole recipe of {run.label}", code(dump_yaml(run.recipe).splitlines())) for run in known
    ]
    return section("settings", "Settings" if len(known) == 1 else "Settings that differ", *body)


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each single value of a recipe under its dotted key, as `--set` takes it.

    Entries of a list are named by their name or kind where that is theirs alone, else by their index.
    """
    if isinstance(tree, dict) and tree:
        for name, inner in tree.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list) and any(isinstance(entry, dict | list) for entry in tree):
        names = [_name(entry) for entry in tree]
        for index, (name, entry) in enumerate(zip(names, tree, strict=True)):
            yield from leaves(entry, f"{key}.{name if name and names.count(name) == 1 else index}")
    else:
        yield key, on_one_line(_written(tree), most=_MOST_CHARACTERS)


def _name(entry: Any) -> str | None:
    named = [entry.get(word) for word in ("name", "kind")] if isinstance(entry, dict) else []
    return next((name for name in named if isinstance(name, str)), None)


def _written(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value not in ("", {}) else "''" if value == "" else "{}"
