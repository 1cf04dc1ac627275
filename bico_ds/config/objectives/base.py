"""What is known of an objective without torch: its part of the recipe, its identity, its cost, its place in the monitor.

The other half, which builds batches, is the file of the same name in bico_ds/objectives/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bico_ds.config.section import Probability, Section


@dataclass(frozen=True, kw_only=True)
class ObjectiveCost:
    """What documents are expected to cost in one step of an objective; each float64 [D], one number per document.

    `kept_rows` and `live_rows` go through the model, the live ones as queries only. `pairs` counts the (query, key)
    pairs that attention looks at, per head and layer. `head_rows` are the rows that have a loss, and logits.
    """

    kept_rows: NDArray[np.float64]
    live_rows: NDArray[np.float64]
    pairs: NDArray[np.float64]
    head_rows: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MonitorPlace:
    """Where the loss of an objective is shown: the TensorBoard chart that it shares, and its colour (``#rrggbb``)."""

    chart: str = "loss"
    colour: str


class ObjectiveSpec(Section, ABC):
    """One entry of the recipe's `objectives`.

    A subclass narrows `kind` to its own name, ``kind: Literal["mine"] = "mine"``, sets `monitor`, and raises
    `identity_version` when equal values come to mean other batches.
    """

    kind: str
    probability: Probability = 1.0

    identity_version: ClassVar[int] = 1
    monitor: ClassVar[MonitorPlace]

    def identity(self) -> dict[str, Any]:
        """What the batches depend on, JSON-able: the kind, its version, and every value that is not the default.

        Defaults are left out so that a key that is added later does not refuse the checkpoints of before. Hence a
        default, too, changes only together with `identity_version`. The probability is the schedule's.
        """
        named = {key: value for key, value in _changed(self).items() if key not in ("kind", "probability")}
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
            changed[key] = _changed(value, usual) if nested else values[key]
    return changed
