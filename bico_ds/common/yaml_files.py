"""YAML that a user wrote: plain values, read within bounds, and where each of them stands.

Read as by YAML 1.2 where the two differ and a recipe would suffer: `2e-5` is a number, `2024-01-01` and `1:20` are texts,
and a key is the word that is written. Merge keys (`<<: *anchor`) are followed. Tags beyond those of plain values
(`!!binary`, `!!python/…`) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_bounded
from bico_ds.common.printable import on_one_line

KeyPath = tuple[str | int, ...]

MOST_BYTES = 1 << 19
"""Of a file; the largest of a run, with hundreds of file names, have some 10 KB."""
MOST_VALUES = 10_000
"""In a file, and in what its aliases make of it: nine lines of nine aliases each stand for 9⁹ values."""
MOST_LEVELS = 64
_MOST_DIGITS = 1000
_MOST_SHOWN = 60

_PLAIN = "tag:yaml.org,2002:"
_TEXT, _MERGE, _NULL = f"{_PLAIN}str", f"{_PLAIN}merge", f"{_PLAIN}null"
_NUMBERS = {f"{_PLAIN}int": "whole number", f"{_PLAIN}float": "number"}
_SCALARS = {_TEXT: "text", _NULL: "null", f"{_PLAIN}bool": "true or false", **_NUMBERS}
_READ_AS_TEXT = {f"{_PLAIN}timestamp", f"{_PLAIN}value"}
_NULLS = ("", "~", "null", "Null", "NULL")
_SURROGATE = re.compile("[\ud800-\udfff]")
# `2e-5` has no dot, and YAML 1.1 wants one.
_EXPONENT = (
    f"{_PLAIN}float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class MappingFile:
    """A plain tree of values, and where each key was written; `()` is the key of the whole file."""

    values: dict[str, Any]
    origins: dict[KeyPath, Origin]


def read_mapping(path: Path, wanted: str) -> MappingFile:
    """A YAML file that holds one mapping of keys, not validated. `wanted` ends the error about a file that holds none.

    Raises `UserError` with file and line.
    """
    try:
        text = read_bounded(path, most_bytes=MOST_BYTES).decode("utf-8-sig")
    except JsonError as error:
        raise UserError(str(error)) from None
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: not UTF-8 text ({problem}); save it as UTF-8") from None
    builder = _Builder(str(path))
    node = builder.compose(text)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: {wanted}")
    return MappingFile(builder.build(node, ()), builder.origins)


def read_value(text: str, where: str) -> Any:
    """The one value that `text` is in YAML; None for an empty one. Raises `UserError`, which begins with `where`."""
    builder = _Builder(where, has_lines=False)
    node = builder.compose(text)
    return None if node is None else builder.build(node, ())


def dump_yaml(values: dict[str, Any]) -> str:
    """The YAML that is read as these values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dotted(key: KeyPath) -> str:
    """A key as it is written in `--set`, and shown in messages; long ones are cut."""
    return ".".join(on_one_line(str(part), most=_MOST_SHOWN) for part in key)


class _Refused(yaml.MarkedYAMLError):
    """What is valid YAML, and not what is read here."""


class _Loader(yaml.SafeLoader):
    """Finds the values of a text, within bounds; nothing is made of them yet."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as its base has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _READ_AS_TEXT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._levels += 1
        self._nodes += 1
        if self._levels > MOST_LEVELS or self._nodes > MOST_VALUES:
            _refuse_size(self._levels, self.get_mark())
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return _TEXT if tag in _NUMBERS and ":" in value else tag


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would take for numbers."""


_Loader.add_implicit_resolver(*_EXPONENT)
_Dumper.add_implicit_resolver(*_EXPONENT)


@dataclass
class _Builder:
    """Makes plain values of a text of `file`, and notes where each was written."""

    file: str
    has_lines: bool = True
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)
    _built: int = 0
    _loader: _Loader = field(init=False)

    def compose(self, text: str) -> yaml.Node | None:
        """The node of the one document in the text; None where there is none. Raises `UserError`."""
        try:
            self._loader = _Loader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            problem = f"has the control character {int(error.character):#x}"  # type: ignore[call-overload]
            raise UserError(f"{self._at(line)}: {problem}: remove it") from None
        try:
            return self._loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            raise self._mistake(error) from None
        except (ValueError, OverflowError) as error:  # "\UFFFFFFFF"
            raise UserError(f"{self._at(self._loader.line)}: not valid YAML: {error}") from None

    def build(self, node: yaml.Node, key: KeyPath) -> Any:
        """The value of a node, which stands at `key`. Raises `UserError`."""
        try:
            return self._value(node, key)
        except yaml.MarkedYAMLError as error:
            raise self._mistake(error) from None

    def _mistake(self, error: yaml.MarkedYAMLError) -> UserError:
        mark = error.problem_mark or error.context_mark
        where = self._at(mark.line) if mark else Origin(self.file, 0)
        kind = "" if isinstance(error, _Refused) else "not valid YAML: "
        return UserError(f"{where}: {kind}{on_one_line(str(error.problem or error.context), most=300)}")

    def _at(self, line: int) -> Origin:
        return Origin(self.file, line + 1 if self.has_lines else 0)

    def _value(self, node: yaml.Node, key: KeyPath) -> Any:
        self.origins.setdefault(key, self._at(node.start_mark.line))
        self._count(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag != _PLAIN + ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            _refuse_tag(node)
        self._enter(node)
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = {}
            for name, key_node, value_node in self._pairs(node, key):
                if name not in value:
                    self.origins[(*key, name)] = self._at(key_node.start_mark.line)
                    value[name] = self._value(value_node, (*key, name))
        else:
            value = [self._value(item, (*key, index)) for index, item in enumerate(node.value)]
        self._open.remove(id(node))
        return value

    def _pairs(self, node: yaml.MappingNode, key: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Name, key and value of a mapping's own keys, then of those that it merges, of which the first of a name counts."""
        own: set[str] = set()
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            name = self._name(key_node)
            if name in own:
                _refuse(f"key '{dotted((*key, name))}' is given twice", key_node)
            own.add(name)
            if key_node.tag == _MERGE:
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                yield name, key_node, value_node
        for other in merged:
            self._count(other)
            if not isinstance(other, yaml.MappingNode):
                _refuse("'<<' takes a mapping, as in '<<: *name', or a list of mappings", other)
            self._enter(other)
            for pair in self._pairs(other, key):
                self._count(other)
                yield pair
            self._open.remove(id(other))

    def _enter(self, node: yaml.Node) -> None:
        """Note that the node's values are being built. Raises where they are already: an alias stands in what it names."""
        if id(node) in self._open:
            _refuse("an alias ('*name') stands inside the value that it names", node)
        self._open.add(id(node))
        if len(self._open) > MOST_LEVELS:
            _refuse_size(len(self._open), node.start_mark)

    def _count(self, node: yaml.Node) -> None:
        self._built += 1
        if self._built > MOST_VALUES:
            _refuse_size(0, node.start_mark)

    def _name(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            _refuse("a key is one word; this one is a list or mapping", node)
        if node.tag != _MERGE and node.tag not in _SCALARS:
            _refuse_tag(node)
        if not node.value:
            _refuse("a key is empty", node)
        return _whole_characters(node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SCALARS:
            _refuse_tag(node)
        if node.tag == _TEXT:
            return _whole_characters(node)
        wrong = node.tag == _NULL and node.value not in _NULLS
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            _refuse(f"a number of {len(node.value):,} digits", node)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError):
            wrong = True
        if wrong:
            shown = on_one_line(node.value, most=_MOST_SHOWN)
            _refuse(f"'{shown}' is no {_SCALARS[node.tag]}; if it is text, put it in quotes", node)
        return value


def _whole_characters(node: yaml.ScalarNode) -> str:
    """The text of a node; the halves of characters that JSON writes (`"\\ud83d\\ude00"`) are put together."""
    if not _SURROGATE.search(node.value):
        return node.value
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse("a text has half a character (a lone surrogate, as in \\ud83d)", node)


def _refuse_size(levels: int, mark: Any) -> NoReturn:
    limit = (
        f"values are nested more than {MOST_LEVELS} deep"
        if levels > MOST_LEVELS
        else f"there are more than {MOST_VALUES:,} values, those counted that aliases stand for"
    )
    raise _Refused(problem=limit, problem_mark=mark)


def _refuse_tag(node: yaml.Node) -> NoReturn:
    tag = node.tag.replace(_PLAIN, "!!") if isinstance(node.tag, str) else node.tag
    hint = ", and '<<' is a key" if node.tag == _MERGE else ""
    _refuse(
        f"'{tag}' is none of the values here: mappings, lists, texts, numbers, true, false, null{hint}", node
    )


def _refuse(problem: str, node: yaml.Node) -> NoReturn:
    raise _Refused(problem=problem, problem_mark=node.start_mark)
