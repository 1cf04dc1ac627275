"""By what each objective draws its masks: a second one of a kind not by what the first one draws by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bico_ds.common.random_numbers import hash_words
from bico_ds.data.loading import identity
from bico_ds.objectives.base import Objective


def numbers_of_draws(
    objectives: Sequence[Objective], asked: Sequence[int] | None, saved: Mapping[str, Any] | None
) -> list[int]:
    """Return the number of each objective's draws, `asked` (None: all 0); `saved`: the identity of a checkpoint, if any.

    An objective that the checkpoint knows without a number goes on with 0, by which all drew before there were numbers.
    """
    numbers = [0] * len(objectives) if asked is None else list(asked)
    known = saved or {}
    for index, objective in enumerate(objectives):
        key = f"objectives[{index}]"
        if f"{key}.draws" not in known and known.get(key) == identity.of_objective(objective):
            numbers[index] = 0
    return numbers


def seed_of_draws(seed: int, number: int) -> int:
    """Return what objectives with draws of this number draw by: of number 0 the run's seed itself."""
    return int(hash_words("draws", seed, number)[0]) if number else seed
