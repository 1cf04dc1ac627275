"""What a key of the recipe may hold, read from its annotation: the one form of which words and JSON Schema are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from bico_ds.config.bounds import Bound
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS
from bico_ds.config.paths import FolderOrHubName, LocalPath, WrittenPath
from bico_ds.config.section import Section


@dataclass(frozen=True)
class Null:
    """No value."""


@dataclass(frozen=True)
class Flag:
    """True or false."""


@dataclass(frozen=True)
class Number:
    """A number within `bound`; a `whole` one, or any."""

    whole: bool
    bound: Bound | None = None


@dataclass(frozen=True)
class Text:
    """A text, of so many characters `at_least` and `at_most`, that matches `pattern`."""

    at_least: int = 0
    at_most: int | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class Place:
    """A path or a name, as `kind` reads it."""

    kind: type[WrittenPath]


@dataclass(frozen=True)
class Choice:
    """One of these texts."""

    of: tuple[str, ...]


@dataclass(frozen=True)
class Many:
    """A list of such entries, `at_least` so many; exactly so many where a number is `fixed`."""

    entry: Value
    at_least: int = 0
    fixed: int | None = None


@dataclass(frozen=True)
class Free:
    """A mapping whose keys are not the recipe's own."""


@dataclass(frozen=True)
class Group:
    """A mapping with the keys of `section`; `defaults` are theirs, where they differ from the section's own."""

    section: type[Section]
    defaults: Section | None = field(default=None, compare=False)

    @property
    def kind(self) -> str | None:
        """The word that its key `kind` must be; None where it has no such key."""
        known = self.section.model_fields.get("kind")
        words = get_args(known.annotation) if known is not None else ()
        return words[0] if len(words) == 1 else None


@dataclass(frozen=True)
class OneOf:
    """Any of these, none of them a `OneOf`."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Unknown:
    """Whatever an objective of a user's own takes."""


Value = Null | Flag | Number | Text | Place | Choice | Many | Free | Group | OneOf | Unknown

_SIMPLE: dict[Any, Value] = {NoneType: Null(), bool: Flag()}


def value_of(known: FieldInfo) -> Value:
    """What a key of this field may hold."""
    value = _read(known.annotation, tuple(known.metadata))
    if isinstance(value, Group) and isinstance(known.default, Section):
        return Group(value.section, known.default)
    return value


def _read(annotation: Any, rules: tuple[Any, ...] = ()) -> Value:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _read(inner[0], (*rules, *_flat(inner[1:])))
    if origin in (Union, UnionType):
        return _one_of(inner)
    if origin is Literal:
        return Choice(tuple(map(str, inner)))
    if origin is list:
        return Many(_read(inner[0]), at_least=_rule(rules, "min_length", 0))
    if origin is tuple and len(set(inner)) == 1:
        return Many(_read(inner[0]), fixed=len(inner))
    if origin is dict:
        return Free()
    return _read_class(annotation, rules)


def _read_class(annotation: Any, rules: tuple[Any, ...]) -> Value:
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    if annotation in (int, float):
        bounds = [rule for rule in rules if isinstance(rule, Bound)]
        return Number(annotation is int, bounds[0] if bounds else None)
    if annotation is str:
        return Text(
            _rule(rules, "min_length", 0), _rule(rules, "max_length", None), _rule(rules, "pattern", None)
        )
    if annotation is ObjectiveSpec:
        return OneOf(tuple(Group(kind.spec) for kind in KINDS.values()))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Group(annotation)
    if isinstance(annotation, type) and issubclass(annotation, WrittenPath):
        nearest = next(
            kind for kind in (FolderOrHubName, LocalPath, WrittenPath) if issubclass(annotation, kind)
        )
        return Place(nearest)
    return Unknown()


def _one_of(annotations: tuple[Any, ...]) -> Value:
    values = dict.fromkeys(part for annotation in annotations for part in alternatives(_read(annotation)))
    return OneOf(tuple(values)) if len(values) > 1 else next(iter(values))


def _flat(rules: tuple[Any, ...]) -> Iterator[Any]:
    """Pydantic takes `Field(…)` for several rules at once."""
    for rule in rules:
        if isinstance(rule, FieldInfo):
            yield from rule.metadata
        else:
            yield rule


def _rule(rules: tuple[Any, ...], name: str, default: Any) -> Any:
    return next((found for rule in rules if (found := getattr(rule, name, None)) is not None), default)


def alternatives(value: Value) -> tuple[Value, ...]:
    """The values of which it may be one."""
    return value.values if isinstance(value, OneOf) else (value,)


def groups(value: Value) -> list[Group]:
    """The mappings of keys that may stand here, or be entries of a list that stands here."""
    found = []
    for part in alternatives(value):
        if isinstance(part, Many):
            found += groups(part.entry)
        elif isinstance(part, Group):
            found.append(part)
    return found


def bounds(value: Value) -> list[Bound]:
    """The bounds of the numbers that may stand here, each reason once."""
    found: dict[str, Bound] = {}
    for part in alternatives(value):
        inner = bounds(part.entry) if isinstance(part, Many) else []
        own = [part.bound] if isinstance(part, Number) and part.bound is not None else []
        for bound in (*own, *inner):
            found.setdefault(bound.why, bound)
    return list(found.values())
