"""Values of keys as a reader says them, who knows no Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.yaml_files import read_value
from bico_ds.config.paths import FolderOrHubName, LocalPath
from bico_ds.config.reference.values import (
    Choice,
    Flag,
    Free,
    Group,
    Many,
    Null,
    Number,
    OneOf,
    Place,
    Text,
    Value,
)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_PATTERNS = {_NAME: "of letters, digits, '.', '_' and '-', the first a letter or digit"}


def in_words(value: Value) -> str:
    """What may stand here: `whole number from 1, or null`."""
    if isinstance(value, OneOf):
        null = ", or null" if Null() in value.values else ""
        return _joined(_one(part) for part in value.values if part != Null()) + null
    return _one(value)


def _one(value: Value) -> str:
    """One value, or kind of entry."""
    match value:
        case Flag():
            return "true or false"
        case Choice(of):
            return _joined(of)
        case Free():
            return "mapping of any keys"
        case Group():
            return "section"
        case Many(entry, at_least, fixed):
            few = f"{fixed} " if fixed else ""
            return f"list of {few}{_several(entry)}" + (" (not empty)" if at_least else "")
        case Number(_, bound) if bound is not None:
            return f"{_noun(value)} {bound.in_words}".strip()
        case Text(_, at_most, pattern):
            matching = _PATTERNS.get(pattern, f"matching {pattern}") if pattern else ""
            most = f"at most {at_most} characters" if at_most else ""
            return ", ".join(filter(None, (f"text {matching}".strip(), most)))
    return _noun(value)


def _noun(value: Value) -> str:
    match value:
        case Number(whole):
            return "whole number" if whole else "number"
        case Text():
            return "text"
        case Place(kind):
            return {FolderOrHubName: "folder or hub name", LocalPath: "path"}.get(kind, "module or path")
        case Null():
            return "null"
    return "any value"


def _several(value: Value) -> str:
    match value:
        case OneOf(values):
            kinds = [part for part in values if isinstance(part, Group)]
            others = dict.fromkeys(_several(part) for part in values if part not in kinds)
            return _joined([*others, *(["sections"] if kinds else [])])
        case Group():
            return "sections"
        case Place(kind) if kind is FolderOrHubName:
            return "folders or hub names"
        case Place(kind) if kind is not LocalPath:
            return "modules or paths"
        case Choice(of):
            return f"these: {_joined(of)}"
        case Number(_, bound) if bound is not None:
            return f"{_noun(value)}s {bound.in_words}".strip()
    return f"{_noun(value)}s"


def _joined(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def sentence(text: str) -> str:
    """A description with a capital letter, and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def inline(value: Any) -> str:
    """A plain value as YAML in one line, which is read as the same value."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)}: {inline(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str):
        return value if _is_read_as(value) else json.dumps(value, ensure_ascii=False)
    return ".inf" if value == math.inf else json.dumps(value)


def _is_read_as(text: str) -> bool:
    """Whether a text needs no quotes, in a list and in a mapping too."""
    try:
        return bool(
            read_value(f"[{{{text}: [{text}]}}]", "") == [{text: [text]}] and read_value(text, "") == text
        )
    except UserError:
        return False
