"""What a parser says of an input that it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bico_ds.common.errors import UserError

MOST_LETTERS = 2500


def refusal(parse: Callable[[], Any]) -> str | None:
    """The one error of `parse`, or None where it takes its input. Fails for other exceptions and for what takes a second."""
    said, begun = None, time.process_time()
    try:
        parse()
    except UserError as error:
        said = str(error)
    assert time.process_time() - begun < 1
    assert said is None or 0 < len(said) < MOST_LETTERS
    return said
