"""The exceptions that end a run with one message, and the hint that may end the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct: shown as one message without a traceback, exit code 2.

    The message names what is wrong, where (recipe key, file and line), and what to do.
    """

    exit_code = 2


class RunError(RuntimeError):
    """What ends a run and is no bug of this program (numbers, disks, other runs): one message, no traceback, exit code 1."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
