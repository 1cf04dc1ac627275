"""By what each objective draws its masks: a second one of a kind not by what the first one draws by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from bico_ds.common.random_numbers import hash_words
from bico_ds.data.loading import identity
from bico_ds.objectives.base import Objective


def numbers_of_draws(
    objectives: Sequence[Objective], asked: Sequence[int] | None, saved: Mapping[str, Any] | None
) -> list[int]:
    """Return the number of each objective's draws, `asked` (None: all 0); `saved`: the identity of a checkpoint, if any.

    An objective that the checkpoint knows without a number goes on with 0, by which all drew before there were numbers;
    where another one of its kind would have 0, that takes the least number that nobody has.
    """
    numbers = [0] * len(objectives) if asked is None else list(asked)
    if asked is None or not saved:
        return numbers
    own = [identity.of_objective(objective) for objective in objectives]
    keys = [f"objectives[{index}]" for index in range(len(own))]
    goes_on = [
        f"{key}.draws" not in saved and saved.get(key) == mine for key, mine in zip(keys, own, strict=True)
    ]
    numbers = [0 if stays else number for number, stays in zip(numbers, goes_on, strict=True)]
    kinds = [mine.get("kind") for mine in own]
    continued = [kind for kind, stays in zip(kinds, goes_on, strict=True) if stays]
    for index, kind in enumerate(kinds):
        if numbers[index] == 0 and not goes_on[index] and kind in continued:
            numbers[index] = next(number for number in count(1) if number not in numbers)
    return numbers


def seed_of_draws(seed: int, number: int) -> int:
    """Return what objectives with draws of this number draw by: of number 0 the run's seed itself."""
    return int(hash_words("draws", seed, number)[0]) if number else seed
