"""Counter-based randomness: a stateless hash of what a draw is for, so that none depends on place, order or history.

The mixing function is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). Words
are folded in one after the other, each through the full mixer. Everything is uint64 arithmetic modulo 2^64, alike on every
machine and in every numpy release, and vectorised: no generator object per document.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = "int | NDArray[np.integer]"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_words(purpose: str, *words: Words) -> NDArray[np.uint64]:
    """Hash (purpose, word, word, …) to uint64, broadcast over the words' shapes, of at least one dimension.

    `purpose` has at most 8 characters, ASCII.
    """
    state = np.array([int.from_bytes(purpose.encode().ljust(8, b"\0")[:8], "little")], dtype=np.uint64)
    assert len(purpose) <= 8, purpose
    for word in words:
        state = _mix(state ^ _as_uint64(word))
    return state


def stream(keys: NDArray[np.uint64], counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The `counters`-th word of the SplitMix64 stream that starts at `keys`, element by element."""
    return _mix(keys + _as_uint64(counters) * _GOLDEN)


def uniform(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map hashes to uniform numbers in [0, 1), 53 bits each."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _as_uint64(word: Words) -> NDArray[np.uint64]:
    if isinstance(word, np.ndarray):
        return np.atleast_1d(word).astype(np.uint64, copy=False)
    return np.array([int(word) % 2**64], dtype=np.uint64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + _GOLDEN
    state ^= state >> np.uint64(30)
    state *= _MIX_1
    state ^= state >> np.uint64(27)
    state *= _MIX_2
    state ^= state >> np.uint64(31)
    return state
