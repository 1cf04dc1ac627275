"""From the recipe's `objectives` to objects."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS, objective_names
from bico_ds.objectives.base import Objective, TokenRoles

PARTS = ("of", "identity", "check", "expand", "build")  # methods of an `Objective`; `name` may be set by `of`


def build_objectives(specs: Sequence[ObjectiveSpec], tokens: TokenRoles) -> list[Objective]:
    """Build the objectives, in the recipe's order, with unique names (`bico`, `bico_2`, …).

    Raises `UserError` where the table names no class of an objective, or spec and tokens do not fit.
    """
    return [
        _objective_class(spec.kind).of(spec, tokens, name=name, key=f"objectives[{index}]")
        for index, (spec, name) in enumerate(zip(specs, objective_names(specs), strict=True))
    ]


def _objective_class(kind: str) -> type[Objective]:
    path = KINDS[kind].objective
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective kind '{kind}': cannot find {path} ({error})") from error
    missing = [part for part in PARTS if not hasattr(found, part)]
    if not isinstance(found, type) or missing:
        raise UserError(f"objective kind '{kind}': {path} is no objective, it lacks {', '.join(missing)}")
    return found
