"""A grid over a recipe: the values that some keys take in turn, and a name for each of their combinations."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import word_without_secrets
from bico_ds.common.yaml_files import read_value

MOST_RUNS = 1000
_MOST_SHOWN = 100
_LONGEST_NAME, _LONGEST_VALUE = 120, 40  # characters; file systems take names of 255 bytes
# Between a name's parts stands what no recipe's name has. A comma would part a path where containers are told what to
# mount, and where lm-eval is told which model to load.
_JOINT = "+"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Axis:
    """A key of the recipe, as `--set` names it, and the plain YAML values that it takes."""

    key: str
    values: tuple[Any, ...]

    @property
    def parts(self) -> list[str]:
        """The words of the key's path."""
        return [part for part in re.split(r"[.\[\]]+", self.key.removesuffix("+")) if part]


@dataclass(frozen=True)
class Point:
    """One combination of values: `values` by key, `labels` by what a name calls the key."""

    values: dict[str, Any]
    labels: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """What `--set` takes."""
        return [f"{key}={_as_json(value)}" for key, value in self.values.items()]

    def name_of_run(self, recipe: str) -> str:
        """The folder of this point's run: `tiny_bico+rate=0.15+seed=1`.

        It depends on recipe and values alone, so that a grid to which values are added keeps the folders that it has.
        What has no place in the name of a file is replaced, and what is long is cut; then a digest tells it from others.
        """
        name = _JOINT.join([recipe, *(f"{label}={_word(value)}" for label, value in self.labels.items())])
        if len(name) <= _LONGEST_NAME:
            return name
        return f"{name[: _LONGEST_NAME - 9]}-{_digest(name, 8)}"


def parse_axis(text: str) -> Axis:
    """Read `KEY.PATH=VALUE,VALUE,…`, the values in YAML, a list in brackets. Raises `UserError`."""
    key, equals, values = (part.strip() for part in text.partition("="))
    shown = on_one_line(word_without_secrets(text), most=_MOST_SHOWN)
    if shown != on_one_line(text, most=_MOST_SHOWN):
        raise UserError(f"'{shown}': a secret, which the names of folders would show")
    if not equals or not key or not values:
        raise UserError(f"'{shown}': expected key.path=value,value as in optimizer.lr=1e-5,2e-5")
    if values.endswith(","):
        raise UserError(f"'{shown}': a value is missing behind the last comma")
    read = read_value(f"[{values}]", f"'{shown}'")
    for value in read:
        try:
            _as_json(value)
        except ValueError:
            raise UserError(f"'{shown}': {value} is no number that a recipe can have") from None
    twice = [value for number, value in enumerate(read) if _is_among(value, read[:number])]
    if twice:
        raise UserError(f"'{shown}': {_as_json(twice[0])} is given twice")
    return Axis(key, tuple(read))


def points(axes: Sequence[Axis]) -> list[Point]:
    """All combinations, those of the last axis side by side; one without values where there are no axes.

    Raises `UserError` for a key that two axes have, and for more than `MOST_RUNS`.
    """
    for number, axis in enumerate(axes):
        if axis.parts in [other.parts for other in axes[:number]]:
            raise UserError(f"--grid {axis.key}: given twice; write all of its values behind one '='")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_RUNS:
        raise UserError(f"--grid: {count:,} combinations are more than {MOST_RUNS:,}; give fewer values")
    labels = [_label(axis, [other for other in axes if other is not axis]) for axis in axes]
    return [
        Point(
            dict(zip([axis.key for axis in axes], values, strict=True)),
            dict(zip(labels, values, strict=True)),
        )
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def _label(axis: Axis, others: Sequence[Axis]) -> str:
    """The shortest end of the key that begins with a word, and is no other key's end, too."""
    for size in range(1, len(axis.parts)):
        end = axis.parts[-size:]
        if not end[0].isdigit() and end not in [other.parts[-size:] for other in others]:
            return _safe(".".join(end))
    return _safe(".".join(axis.parts))


def _word(value: Any) -> str:
    """A value as a part of a file's name."""
    text = value if isinstance(value, str) else _as_json(value)
    if isinstance(value, float):
        text = re.sub(r"e\+?(-?)0*", r"e\1", text)
    is_itself = not isinstance(value, str) or _reads_as_text(value)
    if is_itself and text and _safe(text) == text and len(text) <= _LONGEST_VALUE:
        return text
    shown = _safe(text)[: _LONGEST_VALUE - 7].strip("-")
    return f"{shown}-{_digest(_as_json(value), 6)}"


def _reads_as_text(value: str) -> bool:
    """Whether it stands for itself: `'1'` in quotes does not."""
    try:
        return bool(read_value(value, "") == value)
    except UserError:
        return False


def _safe(text: str) -> str:
    return _UNSAFE.sub("-", text)


def _is_among(value: Any, others: Sequence[Any]) -> bool:
    """Python calls True equal to 1, and YAML does not."""
    return _as_json(value) in map(_as_json, others)


def _as_json(value: Any) -> str:
    """The value on one line of JSON, which is YAML, too. Raises `ValueError` for an infinite number."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def _digest(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode()).hexdigest()[:size]
