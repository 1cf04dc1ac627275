"""The table of objectives: by kind, the spec and where the objective stands that builds its batches.

A recipe's `imports` add to it: a module that calls `register` when it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from bico_ds.config.errors import UserError, did_you_mean
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.unique_names import unique_names


@dataclass(frozen=True)
class Kind:
    """One kind of objective; `objective` is ``module:Class``, imported when a run's objectives are built: it needs torch."""

    spec: type[ObjectiveSpec]
    objective: str


_KINDS: dict[str, Kind] = {}
KINDS: Mapping[str, Kind] = MappingProxyType(_KINDS)


def register(spec: type[ObjectiveSpec], objective: str) -> None:
    """Add a kind of objective, named by the one value that `spec.kind` allows.

    `objective`: ``module:Class`` of a `bico_ds.objectives.base.Objective` with the class method ``of`` (see there).
    The same class again replaces its spec. Raises `UserError` where the spec names no kind, or another class has it.
    """
    names = get_args(spec.model_fields["kind"].annotation)
    if len(names) != 1:
        raise UserError(f'{spec.__name__}: its kind must be one word, as in  kind: Literal["mine"] = "mine"')
    kind = Kind(spec, objective)
    if _KINDS.get(names[0], kind).objective != objective:
        raise UserError(
            f"objective kind '{names[0]}': {objective} and {_KINDS[names[0]].objective} both have it"
        )
    _KINDS[names[0]] = kind


register(NtpSpec, "bico_ds.objectives.ntp:NextTokenPrediction")
register(BicoSpec, "bico_ds.objectives.bico:MaskDenoising")


def read_spec(value: Any) -> ObjectiveSpec:
    """Validate one entry of a recipe's `objectives` by its kind. Raises pydantic's `ValidationError`."""
    if isinstance(value, ObjectiveSpec):
        return value
    known = f"known are {', '.join(KINDS)}; the recipe's 'imports' add others"
    if not isinstance(value, dict) or "kind" not in value:
        raise _wrong_kind(f"an objective is a mapping with a 'kind': {known}", value, ())
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise _wrong_kind(f"there is no objective of kind '{kind}'{hint}: {known}", kind, ("kind",))
    return KINDS[kind].spec.model_validate(value)


def _wrong_kind(message: str, value: Any, key: tuple[str, ...]) -> ValidationError:
    error = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "objectives", [InitErrorDetails(type=error, loc=key, input=value)]
    )


def objective_names(specs: Sequence[ObjectiveSpec]) -> list[str]:
    """Return the names of a run's objectives in its logs: the kind, made unique (`bico`, `bico_2`, …)."""
    return unique_names(spec.kind for spec in specs)
