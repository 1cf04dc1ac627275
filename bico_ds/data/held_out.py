"""Which groups, or texts, are held out: by their hash and a seed, and of few the number that is nearest to the share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.random_numbers import stream

# From so many on the share is met well enough when each is drawn by itself, and then a group, or a text, falls on the same
# side in every store, whatever else is in it.
_DRAWN_ALONE = 500


def held_out(keys: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.uint64]:
    """Return those of these different keys [K], of groups or texts, that are held out; sorted.

    Of fewer than 500 it is the number nearest to `share`, and at least one on either side where there are two.
    """
    scattered = stream(keys, np.array([seed % 2**63]))
    if len(keys) >= _DRAWN_ALONE:
        return np.sort(keys[scattered.astype(np.float64) < share * 2.0**64])
    number = int(np.floor(len(keys) * share + 0.5))
    if len(keys) > 1:
        number = min(max(number, 1), len(keys) - 1)
    order = np.lexsort((keys, scattered))
    return np.sort(keys[order[:number]])
