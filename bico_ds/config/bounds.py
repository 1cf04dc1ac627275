"""Bounds of numbers with their reasons: of a recipe's keys, a model's config and command-line options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


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
        """What is wrong with `value`, as the end of `KEY: …`; None where it is a number within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number: {self.why}"
        if self._holds(value):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number: {self.why}"
        return f"must be {self}: {self.why}"

    def __str__(self) -> str:
        if self.least is not None and self.least == self.most:
            return _written(self.least)
        words = {
            "at least": self.least,
            "greater than": self.above,
            "at most": self.most,
            "less than": self.below,
        }
        return " and ".join(f"{word} {_written(limit)}" for word, limit in words.items() if limit is not None)

    def _holds(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return self.or_infinite and value == math.inf
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, read: core_schema.ValidatorFunctionWrapHandler) -> Any:
        """The number that pydantic reads: 2.0 is a whole number, too."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        number = read(value) if is_number else value
        if (problem := self.problem(number)) is not None:
            raise PydanticCustomError("bound", "{problem}", {"problem": problem})
        return number


def _written(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
