"""The table of objectives: for each kind, its spec and the class that builds its batches.

A recipe's `imports` add to it: a module that calls `register` when it is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.printable import on_one_line
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.base import MonitorPlace, ObjectiveSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masked_ft import MaskedFtSpec
from bico_ds.config.objectives.mlm_u import MlmUSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.reverse import ReverseSpec
from bico_ds.config.section import mistake_at
from bico_ds.config.sections.data import Derive
from bico_ds.config.unique_names import unique_names


@dataclass(frozen=True)
class Kind:
    """One kind of objective; `objective` is `module:Class`, imported when a run's objectives are built: it needs torch."""

    spec: type[ObjectiveSpec]
    objective: str

    def __str__(self) -> str:
        return f"{self.spec.__module__}.{self.spec.__qualname__} with {self.objective}"


_TOTAL = "all"
_MOST_SHOWN = 60
_KINDS: dict[str, Kind] = {}
KINDS: Mapping[str, Kind] = MappingProxyType(_KINDS)


def register(spec: type[ObjectiveSpec], objective: str) -> None:
    """Add a kind of objective, named by the one value that `spec.kind` allows.

    `objective`: `module:Class` of a `bico_ds.objectives.base.Objective` with the class method `of` (see there).
    Raises `UserError` where the spec names no kind, lacks a part, or has a kind that is taken.
    """
    names = get_args(spec.model_fields["kind"].annotation)
    if len(names) != 1:
        raise UserError(f'{spec.__name__}: its kind must be one word, as in  kind: Literal["mine"] = "mine"')
    if inspect.isabstract(spec) or not isinstance(getattr(spec, "monitor", None), MonitorPlace):
        raise UserError(f"{spec.__name__}: it needs the method `cost` and a MonitorPlace as `monitor`")
    # any module that importlib finds: not all of their names are identifiers
    if not re.fullmatch(r"[^:.][^:]*:\w+", objective):
        raise UserError(f"{spec.__name__}: '{objective}' is not MODULE:CLASS")
    name, kind = names[0], Kind(spec, objective)
    if name == _TOTAL:
        raise UserError(f"{spec.__name__}: '{_TOTAL}' is the name of the loss over all objectives")
    if (other := _KINDS.get(name, kind)) != kind:
        raise UserError(f"objective kind '{name}': {other} has it, so {kind} needs another")
    _KINDS[name] = kind


register(NtpSpec, "bico_ds.objectives.ntp:NextTokenPrediction")
register(BicoSpec, "bico_ds.objectives.bico:MaskDenoising")
register(AbiSpec, "bico_ds.objectives.abi:BlankInfilling")
register(MlmUSpec, "bico_ds.objectives.mlm_u:UniformRateDenoising")
register(ReverseSpec, "bico_ds.objectives.reverse:ReverseTraining")
register(MaskedFtSpec, "bico_ds.objectives.masked_ft:MaskedFineTuning")


def read_spec(value: Any) -> ObjectiveSpec:
    """Validate one entry of a recipe's `objectives` by its kind. Raises pydantic's `ValidationError`."""
    if isinstance(value, ObjectiveSpec):
        return value
    known = f"known are {', '.join(KINDS)}; the recipe's 'imports' add others"
    if not isinstance(value, dict) or "kind" not in value:
        raise mistake_at((), f"an objective is a mapping with a 'kind': {known}", value)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        if kind in get_args(Derive):
            hint = f" (it is of the data: set 'derive: {kind}' on a data source)"
        raise mistake_at(
            ("kind",),
            f"there is no objective of kind '{on_one_line(str(kind), most=_MOST_SHOWN)}'{hint}: {known}",
            kind,
        )
    return KINDS[kind].spec.model_validate(value)


def numbers_in_kind(specs: Sequence[ObjectiveSpec]) -> list[int]:
    """Return the number of each objective among those of its kind: 0, 1, …"""
    kinds = [spec.kind for spec in specs]
    return [kinds[:index].count(kind) for index, kind in enumerate(kinds)]


def objective_names(specs: Sequence[ObjectiveSpec]) -> list[str]:
    """Return the names of a run's objectives in its logs: the kind, made unique (`bico`, `bico_2`, …)."""
    return unique_names(spec.kind for spec in specs)
