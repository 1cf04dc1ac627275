"""What is known of an objective without torch: its part of the recipe, identity, cost, and chart in the monitor.

The other half, which builds batches, is the file of the same name in bico_ds/objectives/.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.section import Probability, Section

AttentionMode = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveCost:
    """What documents are expected to cost in one step of an objective; each float64 [D], one number per document.

    `kept_rows` and `live_rows` go through the model. `pairs` counts the (query, key) pairs that attention looks at, per head
    and layer; `span_pairs` those of them whose key is a live row, which only live rows see; None: none is a key. `head_rows`
    are the rows that have a loss, and logits.
    """

    kept_rows: NDArray[np.float64]
    live_rows: NDArray[np.float64]
    pairs: NDArray[np.float64]
    head_rows: NDArray[np.float64]
    span_pairs: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class MonitorPlace:
    """Where the loss of an objective is shown: the TensorBoard chart that it shares, and its colour (`#rrggbb`)."""

    chart: str = "loss"
    colour: str


# What of an objective does not change its batches, but which there are.
_OF_THE_STREAM = ("kind", "probability", "sources")


class ObjectiveSpec(Section, ABC):
    """One entry of the recipe's `objectives`.

    A subclass narrows `kind` to its own name, `kind: Literal["mine"] = "mine"`, sets `monitor`, and raises
    `identity_version` when equal values come to mean other batches. `attention`: the mode of its batches' plans, which
    plans of memory need. `as_written`: whether its rows are the documents' own tokens in their order.
    """

    kind: str = Field(description="the kind of objective; it decides which other keys there are")
    probability: Probability = Field(
        1.0,
        description="its share of the steps, or of what `share_by` says; those of all objectives sum to 1",
        examples=[0.5],
    )
    sources: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="names of the data sources that its steps draw from; null: all of them",
        examples=[["facts"]],
    )

    identity_version: ClassVar[int] = 1
    monitor: ClassVar[MonitorPlace]
    attention: ClassVar[AttentionMode] = "bidirectional"
    as_written: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        """What the batches depend on, JSON-able: the kind, its version, and every value that is not the default.

        Defaults are left out, also of the sections in it, so that a key that is added later does not refuse the
        checkpoints of before. So a default, too, changes only together with `identity_version`. Probability and sources are
        left out, since they belong to the stream (`bico_ds.data.loading.identity`).
        """
        named = {key: value for key, value in _changed(self).items() if key not in _OF_THE_STREAM}
        return {"kind": self.kind, "version": self.identity_version, **named}

    @abstractmethod
    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """Return the expected cost of documents of these lengths, int64 [D], in tokens, each at least 1."""


def _changed(section: Section, default: Section | None = None) -> dict[str, Any]:
    """The values, JSON-able, that differ from the fields' defaults, or from those of the section that is the default."""
    values, changed = section.model_dump(mode="json"), {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        usual = field.get_default(call_default_factory=True) if default is None else getattr(default, key)
        if value != usual:
            nested = isinstance(value, Section) and type(value) is type(usual)
            changed[key] = (
                _changed(value, usual)
                if nested
                else _without_defaults(value, values[key], _sections(field.annotation))
            )
    return changed


def _without_defaults(value: Any, dumped: Any, possible: set[type[Section]]) -> Any:
    """`dumped`, the JSON of `value`, without the defaults of the sections in it, of which `possible` can stand there.

    Where several can, the keys that allow a single value (`kind`) stay, so that they differ; without any, all keys stay.
    """
    if isinstance(value, Section) and isinstance(dumped, dict):
        if possible == {type(value)}:
            return _changed(value)
        words = {
            key: dumped[key] for key, field in type(value).model_fields.items() if _is_word(field.annotation)
        }
        return words | _changed(value) if words else dumped
    if isinstance(value, Mapping) and isinstance(dumped, dict):
        pairs = zip(dumped, value.values(), dumped.values(), strict=True)
        return {key: _without_defaults(part, written, possible) for key, part, written in pairs}
    if isinstance(value, Sequence | Set) and isinstance(dumped, list):
        parts = [
            _without_defaults(part, written, possible) for part, written in zip(value, dumped, strict=True)
        ]
        return parts if isinstance(value, Sequence) else sorted(parts, key=json.dumps)  # a set has no order
    return dumped


def _sections(annotation: Any) -> set[type[Section]]:
    """The sections that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {section for part in get_args(annotation) for section in _sections(part)}


def _is_word(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1
