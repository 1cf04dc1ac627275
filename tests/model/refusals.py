"""What a parser says of an input that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bico_ds.common.errors import UserError
from tests.cpu_time import cpu_seconds_below

MOST_LETTERS = 2500


def refusal(parse: Callable[[], Any]) -> str | None:
    """The one error of `parse`, or None where it takes its input. Fails for other exceptions and for what takes a second."""
    said = None
    with cpu_seconds_below(1):
        try:
            parse()
        except UserError as error:
            said = str(error)
    assert said is None or 0 < len(said) < MOST_LETTERS
    return said
