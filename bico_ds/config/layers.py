"""What lies over what in a recipe: a file over the one that it extends, `--set KEY.PATH=VALUE` over both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import without_secrets, word_without_secrets
from bico_ds.common.yaml_files import KeyPath, MappingFile, Origin, dotted, read_value
from bico_ds.config.sections.data import SourceSpec

_OVERRIDE = "--set "
_SOURCES = ("data", "sources")
# `objectives.1.mask`, `objectives[1].mask`; in brackets a name may have dots.
_PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[[^\[\]]+\])*")
_PART = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")
_INDEX = re.compile(r"[0-9]{1,9}")
_MOST_SHOWN, _MOST_LISTED = 100, 10


def merge_files(base: MappingFile, top: MappingFile) -> MappingFile:
    """Mappings merge key by key; lists and scalars of `top` replace those of `base`, those of a `key+` are added to it."""
    additions = list(_take_additions(top.values, ()))
    values = merge_mappings(base.values, top.values)
    origins = {key: origin for key, origin in base.origins.items() if not _replaced(key, top.values)}
    tree = MappingFile(values, origins | top.origins)
    for key, added in additions:
        path = (*key[:-1], str(key[-1])[:-1])
        _add_to_list(tree, path, added, written=key, where=f"{tree.origins[key]}: {dotted(key)}")
    return tree


def merge_mappings(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else in `top` replaces what `base` has."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge_mappings(base[key], value) if both else value
    return merged


def apply_override(tree: MappingFile, override: str) -> None:
    """Set the key that `override`, `KEY.PATH=VALUE`, names, or add to the list of `KEY.PATH+=VALUE`.

    An entry of a list is named by its index, or by the name or kind that it alone has: `objectives.1.mask.rate`,
    `objectives[1].mask.rate`, `objectives.bico.mask.rate`. Sections that the recipe leaves out come into being. Raises
    `UserError`.
    """
    written, equals, text = override.partition("=")
    adds = written.strip().endswith("+")
    where = _OVERRIDE + on_one_line(word_without_secrets(override), most=_MOST_SHOWN)
    path = written.strip().removesuffix("+")
    if not equals or not _PATH.fullmatch(path):
        raise UserError(f"{where}: expected key.path=value, as in --set optimizer.lr=1e-4")
    parts = [name or word for name, word in _PART.findall(path)]
    value = read_value(text, where)
    if adds:
        key = _resolved(tree, parts, where, makes_sections=False)
        written_key = (*key[:-1], f"{key[-1]}+")
        tree.origins[written_key] = Origin(where, 0)
        _add_to_list(tree, key, value, written=written_key, where=where)
        return
    key = _resolved(tree, parts, where, makes_sections=True)
    value_at(key[:-1], tree.values)[key[-1]] = value
    tree.origins = {other: origin for other, origin in tree.origins.items() if other[: len(key)] != key}
    tree.origins[key] = Origin(where, 0)


def named_key(tree: MappingFile, path: str, where: str) -> KeyPath:
    """The key that `path` names as in `--set`, be it there or not. Raises `UserError`, which begins with `where`."""
    return _resolved(tree, path_parts(path, where), where, makes_sections=False)


def path_parts(path: str, where: str) -> list[str]:
    """The words of a path of keys, `objectives[1].mask.rate`. Raises `UserError`, which begins with `where`."""
    if not _PATH.fullmatch(path):
        raise UserError(f"{where}: expected a key, as in objectives.bico.mask.rate")
    return [name or word for name, word in _PART.findall(path)]


def value_at(path: KeyPath, values: Any) -> Any:
    """What stands at a path of a tree of values; None where nothing does."""
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return None
    return values


class Leaf(NamedTuple):
    """A value of a recipe that holds no keys; `path` is how `--set` names it: `objectives.bico.mask.rate`."""

    key: KeyPath
    path: str
    value: Any


def leaves(values: Any, key: KeyPath = (), path: str = "") -> Iterator[Leaf]:
    """The values of a recipe that hold no keys; `key` and `path`: where `values` stand.

    A list without keys is one value, and so is an empty mapping.
    """
    if isinstance(values, list) and any(isinstance(entry, dict) for entry in values):
        for index, name in enumerate(entry_names(values, key)):
            yield from leaves(values[index], (*key, index), _longer(path, name))
    elif isinstance(values, dict) and values:
        for name, value in values.items():
            yield from leaves(value, (*key, name), _longer(path, name))
    else:
        yield Leaf(key, path, values)


def entry_names(entries: list[Any], key: KeyPath) -> list[str]:
    """What each entry of the list `key` is called in `--set`: by the name or kind that it alone has, else by its index."""
    names = [_names(entry, key) for entry in entries]
    return [
        next((name for name in own if sum(name in others for others in names) == 1), str(index))
        for index, own in enumerate(names)
    ]


def _longer(path: str, part: str) -> str:
    if re.search(r"[.\[\]]", part):
        return f"{path}[{part}]"
    return f"{path}.{part}" if path else part


def is_override(origin: Origin) -> bool:
    """Whether a value comes from a `--set`."""
    return not origin.line and origin.file.startswith(_OVERRIDE)


def _take_additions(values: dict[str, Any], section: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Take all `key+` out of the mapping: the path with the sign, and the value."""
    for name in list(values):
        if name.endswith("+"):
            yield (*section, name), values.pop(name)
        elif isinstance(values[name], dict):
            yield from _take_additions(values[name], (*section, name))


def _add_to_list(tree: MappingFile, path: KeyPath, added: Any, *, written: KeyPath, where: str) -> None:
    """Append `added`, an entry or a list of them, to the list at `path`; `written` is the key of their origins."""
    node = value_at(path, tree.values)
    if not isinstance(node, list):
        raise UserError(f"{where}: it adds to a list, and there is no list '{dotted(path)}' to add to")
    first, entries = len(node), added if isinstance(added, list) else [added]
    node.extend(entries)
    for index in range(len(entries)):
        tree.origins[(*path, first + index)] = tree.origins[written]
    for key in [key for key in tree.origins if key[: len(written)] == written]:
        origin, inner = tree.origins.pop(key), key[len(written) :]
        if isinstance(added, list) and inner:
            tree.origins[(*path, first + int(inner[0]), *inner[1:])] = origin
        elif not isinstance(added, list):
            tree.origins[(*path, first, *inner)] = origin


def _replaced(key: KeyPath, values: Any) -> bool:
    for part in key:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return False


def _resolved(tree: MappingFile, parts: list[str], where: str, *, makes_sections: bool) -> KeyPath:
    """The key that these words name, entries of lists by their indices."""
    node: Any = tree.values
    key: KeyPath = ()
    for last, part in enumerate(parts, start=1 - len(parts)):
        if isinstance(node, list):
            key = (*key, _index(node, part, key, where))
        elif isinstance(node, dict) or (node is None and not makes_sections):
            key = (*key, part)
        else:
            raise UserError(f"{where}: '{dotted(key)}' is a single value, it has no keys")
        if last and isinstance(node, dict) and makes_sections and node.get(part) is None:
            node[part] = {}
        node = value_at(key[-1:], node)
    return key


def _index(entries: list[Any], part: str, key: KeyPath, where: str) -> int:
    if _INDEX.fullmatch(part) and int(part) < len(entries):
        return int(part)
    names = [_names(entry, key) for entry in entries]
    found = [index for index, known in enumerate(names) if part in known]
    if len(found) == 1:
        return found[0]
    if not entries:
        raise UserError(f"{where}: the list '{dotted(key)}' is empty")
    shown = [f"{index} is {_shown(entry, key)}" for index, entry in enumerate(entries[:_MOST_LISTED])]
    several = f"{len(found)} of its entries are '{part}': " if found else ""
    raise UserError(
        f"{where}: {several}the list '{dotted(key)}' has the indices 0 to {len(entries) - 1}: {', '.join(shown)}"
        + (", …" if len(entries) > _MOST_LISTED else "")
    )


def _names(entry: Any, key: KeyPath) -> list[str]:
    """What an entry of the list `key` may be called: its name and kind; of a data source without a name, as logs call it."""
    if not isinstance(entry, dict):
        return []
    names = [entry[word] for word in ("name", "kind") if isinstance(entry.get(word), str)]
    if not names and key == _SOURCES:
        with contextlib.suppress(ValidationError):
            names = [SourceSpec.model_validate(entry).default_name]
    return names


def _shown(entry: Any, key: KeyPath) -> str:
    return on_one_line(next(iter(_names(entry, key)), str(without_secrets(entry))), most=_MOST_SHOWN)
