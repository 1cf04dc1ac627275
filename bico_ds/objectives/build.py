"""From the recipe's `objectives` to objects."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from bico_ds.config.errors import UserError
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS, objective_names
from bico_ds.objectives.base import Objective, TokenFacts


def build_objectives(specs: Sequence[ObjectiveSpec], tokens: TokenFacts) -> list[Objective]:
    """Build the objectives, in the recipe's order, with unique names (`bico`, `bico_2`, …).

    Raises `UserError` where the table names a class that is not there, or spec and tokens do not fit.
    """
    return [
        _objective_class(spec.kind).of(spec, tokens, name=name, key=f"objectives[{index}]")
        for index, (spec, name) in enumerate(zip(specs, objective_names(specs), strict=True))
    ]


def _objective_class(kind: str) -> type[Objective]:
    module, _, name = KINDS[kind].objective.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective kind '{kind}': cannot find {module}:{name} ({error})") from error
