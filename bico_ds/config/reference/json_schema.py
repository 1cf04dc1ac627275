"""The JSON Schema of recipe files (draft 7, which editors read), from the same values as the reference.

It is of a file, not of a run: no key is required, since a recipe `extends` others; lists may be added to (`KEY+`). What
two keys mean together is checked by the loader alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bico_ds.config.reference.keys import ANY, Key, Path, recipe_keys
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
    alternatives,
)

_EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "the recipe that this one changes: a file beside it, a path, or a name in recipes/",
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema; objectives of a recipe's `imports` are in it once these are loaded."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "bico_ds recipe",
        **_mapping(recipe_keys(), (), {"extends": _EXTENDS}, may_add=True),
    }


def _mapping(
    keys: Sequence[Key],
    path: Path,
    properties: dict[str, Any],
    *,
    may_add: bool,
    required: Sequence[str] = (),
) -> dict[str, Any]:
    """A mapping of the keys right below `path`; `may_add`: not in an entry of a list, which no other file has a base of."""
    for key in keys:
        if key.path[:-1] == path and not key.is_entry:
            properties[key.path[-1]] = schema = _described(key, keys, may_add)
            if may_add and (added := _addition(schema)) is not None:
                properties[f"{key.path[-1]}+"] = added
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": list(required)} if required else {}),
    }


def _described(key: Key, keys: Sequence[Key], may_add: bool) -> dict[str, Any]:
    schema = _schema(key.value, key.path, keys, may_add) | {"description": key.description}
    if not key.is_required and key.default is not None:
        schema["default"] = key.default
    return schema | ({"examples": [key.example]} if key.example is not None else {})


def _addition(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Of a list that may grow: an entry, or a list of them."""
    lists = [part for part in schema.get("anyOf", [schema]) if part.get("type") == "array"]
    if not lists or "maxItems" in lists[0]:
        return None
    several = {"type": "array", "items": lists[0]["items"]}
    return {
        "anyOf": [several, lists[0]["items"]],
        "description": f"added to what is inherited: {schema['description']}",
    }


def _schema(value: Value, path: Path, keys: Sequence[Key], may_add: bool) -> dict[str, Any]:
    """Of a value that stands at `path`."""
    match value:
        case Null():
            return {"type": "null"}
        case Flag():
            return {"type": "boolean"}
        case Number():
            return _number(value)
        case Text(at_least, at_most, pattern):
            rules = {"minLength": at_least or None, "maxLength": at_most, "pattern": pattern}
            return {"type": "string"} | {rule: limit for rule, limit in rules.items() if limit is not None}
        case Place():
            return {"type": "string", "minLength": 1}
        case Choice(of):
            # YAML's `off` is false for some readers.
            return {"enum": [*of, *([False] if "off" in of else [])]}
        case Many(entry, at_least, fixed):
            sizes = {"minItems": fixed or at_least or None, "maxItems": fixed}
            items = _entries(entry, path, keys)
            return {"type": "array", "items": items} | {
                rule: size for rule, size in sizes.items() if size is not None
            }
        case Free():
            return {"type": "object"}
        case Group():
            return _mapping(keys, path, {}, may_add=may_add)
        case OneOf(values):
            return {"anyOf": [_schema(part, path, keys, may_add) for part in values]}
    return {}


def _number(value: Number) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer" if value.whole else "number"}
    if (bound := value.bound) is not None:
        limits = {
            "minimum": bound.least,
            "exclusiveMinimum": bound.above,
            "maximum": bound.most,
            "exclusiveMaximum": bound.below,
        }
        schema |= {rule: limit for rule, limit in limits.items() if limit is not None}
    return schema


def _entries(value: Value, path: Path, keys: Sequence[Key]) -> dict[str, Any]:
    """Entries of a list; those with keys are told apart by their `kind`, where there are several."""
    parts = alternatives(value)
    kinds = [part for part in parts if isinstance(part, Group) and part.kind is not None]
    schemas = []
    for part in parts:
        if not isinstance(part, Group):
            schemas.append(_schema(part, path, keys, False))
            continue
        below = (*path, part.kind or ANY)
        required = [key.path[-1] for key in keys if key.path[:-1] == below and key.is_required]
        if len(kinds) > 1 and "kind" not in required:
            required.insert(0, "kind")
        schemas.append(_mapping(keys, below, {}, may_add=False, required=required))
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
