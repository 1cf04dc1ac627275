"""The base of all parts of a recipe, and types that they share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from bico_ds.config.bounds import Bound

Probability = Annotated[float, Bound(above=0, most=1, why="it is a share, and one of 0 would change nothing")]
PositiveInt = Annotated[
    int, Bound(least=1, most=10**12, why="it is a number of things that are at hand, and none is no choice")
]
STEPS = Bound(least=1, most=10**9, why="it counts optimizer steps, and a run of more never ends")
Steps = Annotated[int, STEPS]
Minutes = Annotated[float, Bound(least=1e-3, most=1e6, why="it is a time that somebody waits, in minutes")]
SEED = Bound(least=-(2**63), most=2**64 - 1, why="draws are keyed by words of 64 bits")
Seed = Annotated[int, SEED]


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def mistake_at(key: tuple[str | int, ...], message: str, value: Any) -> ValidationError:
    """What a validator raises about one of the keys below its own: the error then names the line of that key."""
    error = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data("recipe", [InitErrorDetails(type=error, loc=key, input=value)])
