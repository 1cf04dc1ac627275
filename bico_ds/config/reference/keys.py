"""Every key that a recipe may have, in the order of the schema: what it holds, its default, and what it does.

Objectives of a recipe's `imports` are among them once these are loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.printable import on_one_line
from bico_ds.config.paths import replace_paths
from bico_ds.config.reference.values import (
    Choice,
    Flag,
    Free,
    Group,
    Many,
    Null,
    Number,
    Place,
    Text,
    Value,
    alternatives,
    groups,
    value_of,
)
from bico_ds.config.reference.words import inline
from bico_ds.config.schema import Recipe
from bico_ds.config.section import Section

Path = tuple[str, ...]

_MOST_SHOWN, _MOST_LISTED = 100, 3

ANY = "*"
"""In a path, the number or name of an entry of a list; where entries differ by `kind`, their kind stands there."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key, or an entry of a list whose keys follow it.

    `default` is plain, as in YAML; None for a section, whose keys have their own, and where it `is_required`.
    `example`: a value that it may have.
    """

    path: Path
    value: Value
    description: str
    is_required: bool = False
    default: Any = None
    example: Any = None

    @property
    def name(self) -> str:
        """As `--set` names it: of entries that differ by no kind, the first one's."""
        return ".".join("0" if part == ANY else part for part in self.path)

    @property
    def is_kind(self) -> bool:
        """Whether it is an entry of a list, named by its kind."""
        return isinstance(self.value, Group) and self.value.kind == self.path[-1]

    @property
    def has_no_default(self) -> bool:
        """Whether something must be given for it; its name is given to a recipe by `load_recipe`."""
        return self.is_required or self.path == ("name",)

    @property
    def default_in_words(self) -> str:
        """What holds where the key is left out; empty for a section."""
        if self.has_no_default:
            return "the file's name" if self.path == ("name",) else "required"
        return (
            "" if self.has_keys and self.default is None and not self._may_be_null else inline(self.default)
        )

    @property
    def _may_be_null(self) -> bool:
        return Null() in alternatives(self.value)

    @property
    def is_entry(self) -> bool:
        """Whether it is an entry of a list."""
        return self.path[-1] == ANY or self.is_kind

    @property
    def has_keys(self) -> bool:
        """Whether it is a section, or a list of sections."""
        return bool(groups(self.value))


def recipe_keys() -> list[Key]:
    """Return the keys; each section is followed by its own."""
    return list(_keys_of(Group(Recipe), ()))


def _keys_of(group: Group, path: Path) -> Iterator[Key]:
    for name, field in group.section.model_fields.items():
        key = _key(group, name, field, (*path, name))
        yield key
        is_list = any(isinstance(part, Many) for part in alternatives(key.value))
        for inner in groups(key.value):
            below = (*key.path, inner.kind or ANY) if is_list else key.path
            if is_list:
                yield Key(path=below, value=inner, description=_docstring(inner.section))
            yield from _keys_of(inner, below)


def _key(group: Group, name: str, field: FieldInfo, path: Path) -> Key:
    value = value_of(field)
    default = None if field.is_required() else _default(group, name, field)
    description = field.description or _inherited_description(group.section, name)
    if not description and (sections := groups(value)):
        description = _docstring(sections[0].section)
    given = field.examples[0] if field.examples else None
    return Key(
        path=path,
        value=value,
        description=description,
        is_required=field.is_required(),
        default=default,
        example=_example(value, default) if given is None else given,
    )


def _default(group: Group, name: str, field: FieldInfo) -> Any:
    if group.defaults is not None:
        default = getattr(group.defaults, name)
    else:
        default = field.get_default(call_default_factory=True)
    return None if isinstance(default, Section) else _plain(default)


def _plain(value: Any) -> Any:
    """As it stands in YAML."""
    value = replace_paths(value, str)
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _inherited_description(section: type[Section], name: str) -> str:
    """Of a key that a section narrows (`kind`), what its base says of it."""
    bases = [base for base in section.__mro__[1:] if issubclass(base, Section)]
    said = [base.model_fields[name].description for base in bases if name in base.model_fields]
    return next(filter(None, said), "")


def _docstring(section: type[Section]) -> str:
    """The first paragraph of a section's docstring, which says what it is."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split()).rstrip(".")


def _example(value: Value, default: Any) -> Any:
    """Another value than the default where a few are possible, else the default; where that is null, a plain one."""
    for part in alternatives(value):
        match part:
            case Flag():
                return not default
            case Choice(of):
                return next((word for word in of if word != default), of[0])
            case Null() | Group() | Free():
                continue
        return _plain_example(part) if default in (None, "", []) else default
    return default


def _plain_example(value: Value) -> Any:
    match value:
        case Number(whole, bound):
            least = bound.least if bound is not None and bound.least is not None else 1
            return least if whole else max(float(least), 1.0)
        case Text() | Place():
            return "mine"
        case Many(entry, _, fixed):
            return [_plain_example(entry)] * (fixed or 1)
    return None


def example_file(key: Key, keys: Sequence[Key]) -> Any:
    """The example of a key as a recipe with no other key, but for those that an entry of a list must have."""
    entries = {other.path for other in keys if other.is_entry}
    value = key.example
    for end in range(len(key.path), 0, -1):
        part, place = key.path[end - 1], key.path[:end]
        if place in entries:
            if isinstance(value, dict):
                needed = {k.path[-1]: k.example for k in keys if k.path[:-1] == place and k.is_required}
                value = {**({} if part == ANY else {"kind": part}), **needed, **value}
            value = [value]
        else:
            value = {part: value}
    return value


def find(keys: Sequence[Key], parts: Sequence[str]) -> Key:
    """The key that a user's words name. An entry of a list may be named (`data.sources.0.store`) or passed over.

    What follows a mapping of another program's keys (`deepspeed.overrides`) is taken for one of these. Raises `UserError`
    with the nearest keys.
    """
    known = {key.path: key for key in keys}
    path = _matched(known, (), tuple(parts))
    if path is None:
        raise UserError(_unknown(keys, parts))
    return known[path]


def _matched(known: dict[Path, Key], path: Path, parts: Path) -> Path | None:
    if not parts or (path and Free() in alternatives(known[path].value)):
        return path or None
    first, rest = parts[0], parts[1:]
    for step in ((first,), (ANY, first), (ANY,)):
        below = (*path, *step)
        if below in known and (found := _matched(known, below, rest)) is not None:
            return found
    return None


def _unknown(keys: Sequence[Key], parts: Sequence[str]) -> str:
    asked = on_one_line(".".join(parts), most=_MOST_SHOWN)
    names = [key.name for key in keys]
    same = [name for name in names if name.endswith(f".{parts[-1]}")]
    near = did_you_mean(asked, names)
    if kinds := _kinds_missed(keys, parts):
        near = f"; an entry of this list is named by its kind: {', '.join(kinds)}"
    elif same and (len(parts) == 1 or not near):
        near = f" (there is {', '.join(same[:_MOST_LISTED])}{', …' if len(same) > _MOST_LISTED else ''})"
    return f"there is no key '{asked}'{near}; `bico-ds explain` lists the sections"


def _kinds_missed(keys: Sequence[Key], parts: Sequence[str]) -> list[str]:
    """The kinds of the list whose entry these words name by none of them."""
    beside = [key for key in keys if key.is_kind and key.path[:-1] == tuple(parts[: len(key.path) - 1])]
    kinds = [key.path[-1] for key in beside]
    named = parts[len(beside[0].path) - 1 :][:1] if beside else []
    return kinds if named and named[0] not in kinds else []
