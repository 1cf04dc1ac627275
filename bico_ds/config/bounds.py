"""Bounds of numbers with their reasons: of a recipe's keys, a model's config and command-line options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bico_ds.common.secrets import without_secrets

# Characters of a value in a message.
_LONGEST = 60


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The numbers that a value may be, and `why` no others: it ends the message about one.

    Bounds are finite, and so are the numbers, unless `or_infinite`. As the metadata of a field
    (`Annotated[int, Bound(least=1, why="…")]`) it also refuses texts, and true and false, which pydantic would take for
    numbers.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    or_infinite: bool = False
    why: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, to follow its name; None where it is a number within the bounds."""
        if (wanted := self._wanted(value)) is None:
            return None
        return f"must be {wanted}, found {shown(value)}: {self.why}"

    @property
    def in_words(self) -> str:
        """The range, to follow a noun: `from 1 to 10,000`; empty where there is none."""
        low = f"from {_written(self.least)}" if self.least is not None else ""
        low = f"above {_written(self.above)}" if self.above is not None else low
        high = f"to {_written(self.most)}" if self.most is not None else ""
        high = f"to below {_written(self.below)}" if self.below is not None else high
        return f"{low} {high}".strip() + (", or .inf" if self.or_infinite else "")

    def _wanted(self, value: Any) -> str | None:
        """The first condition that `value` does not meet."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number"
        if isinstance(value, float) and not math.isfinite(value):
            return None if self.or_infinite and value == math.inf else "a finite number"
        if self.least is not None and value < self.least:
            return f"at least {_written(self.least)}"
        if self.above is not None and value <= self.above:
            return f"greater than {_written(self.above)}"
        if self.most is not None and value > self.most:
            return f"at most {_written(self.most)}"
        if self.below is not None and value >= self.below:
            return f"less than {_written(self.below)}"
        return None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, read: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if (problem := self.problem(value)) is not None:
            raise PydanticCustomError("value_error", "{problem}", {"problem": problem})
        return read(value)


def _written(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def shown(value: Any) -> str:
    """A value in a message; cut, where it is long."""
    try:
        text = repr(without_secrets(value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of very many digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
