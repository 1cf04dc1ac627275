"""The keys of the reference, and what the loader validates each of them by."""

from __future__ import annotations

from typing import Annotated, Any

from bico_ds.config.reference.keys import Key, recipe_keys
from bico_ds.config.reference.values import groups
from bico_ds.config.schema import Recipe
from bico_ds.config.section import Section

KEYS = recipe_keys()
PLAIN = [key for key in KEYS if not key.has_keys]


def by_name(key: Key) -> str:
    return key.name


def annotation(key: Key) -> Any:
    """The type of a key, for a `TypeAdapter`."""
    owner: type[Section] = Recipe
    for end in range(1, len(key.path)):
        inner = groups(next(other for other in KEYS if other.path == key.path[:end]).value)
        owner = inner[0].section if len(inner) == 1 else owner
    known = owner.model_fields[key.path[-1]]
    return Annotated[(known.annotation, *known.metadata)] if known.metadata else known.annotation
