"""Which steps are profiled: `--profile STEP[:STEPS]`. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import positive

MOST_STEPS = 50
"""A trace of more is too large to look at, and a profile of more says nothing new."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """From step `first` on, which counts from 1 as the console does, `steps` steps; None: one of each objective."""

    first: int
    steps: int | None

    def numbers(self, objective: Callable[[int], str], *, begins: int, total: int) -> list[int]:
        """The numbers of the steps to profile, from 1, in a start of a run of `total` steps that has made `begins`.

        `objective`: the name of the objective of a step, by its number from 1. Where an objective has no step among
        `MOST_STEPS`, the profile is without it. Raises `UserError` for a step that this start does not make.
        """
        self.check_end(total)
        if self.first <= begins:
            left = (
                f": give a step from {begins + 1} to {total}, or" if begins < total else ", the run's last:"
            )
            raise UserError(
                f"--profile: step {self.first} is made; this start begins after step {begins}{left} leave --profile out"
            )
        if self.steps is not None:
            return list(range(self.first, self.first + self.steps))
        found: dict[str, int] = {}
        for step in range(self.first, min(self.first + MOST_STEPS, total + 1)):
            found.setdefault(objective(step), step)
        return list(found.values())

    def check_end(self, total: int) -> None:
        """Raise `UserError` for a step that a run of `total` steps does not make."""
        last = self.first - 1 + (self.steps or 1)
        if last > total:
            raise UserError(f"--profile: step {last} is none of this run, which ends after step {total}")


def profile_request(text: str) -> ProfileRequest:
    """STEP or STEP:STEPS, of an argument."""
    first, colon, steps = text.partition(":")
    request = ProfileRequest(first=positive(first), steps=positive(steps) if colon else None)
    if request.steps is not None and request.steps > MOST_STEPS:
        raise argparse.ArgumentTypeError(f"at most {MOST_STEPS} steps are profiled, not {request.steps}")
    return request
