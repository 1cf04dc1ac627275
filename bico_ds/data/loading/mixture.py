"""Mixtures: how many passes over each source a data epoch has, and which sequences it takes.

A source is an endless stream of passes over its sequences; a data epoch takes the next `passes · sequences` of them. A
complete pass takes every sequence; where an epoch boundary cuts a pass, a seeded permutation decides which sequences
come first, so that over time every sequence of a source is seen equally often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import SourceSpec
from bico_ds.data.loading.packing import seeded_permutation


@dataclass(frozen=True, kw_only=True)
class EpochSequences:
    """The N sequences of one data epoch.

    `index` [N] counts through the sequences of all sources; `passes` [N] is the number of the pass over its source,
    which is the epoch that masks are keyed by.
    """

    index: NDArray[np.integer]
    passes: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A data epoch has `passes[s]` passes over the `counts[s]` sequences of source s."""

    counts: tuple[int, ...]
    passes: tuple[float, ...]
    seed: int

    @staticmethod
    def of(
        sources: Sequence[SourceSpec],
        counts: Sequence[int],
        tokens: Sequence[int],
        seed: int,
        *,
        members: Sequence[int] | None = None,
    ) -> Mixture:
        """Mix sources of so many sequences and tokens; of sources that are not among `members` (None: all are) nothing.

        By `epochs` (default 1) of each, and where some have a `token_share`, so many passes over these that they have that
        share of the epoch's tokens. Or by `weight`: an epoch then has as many sequences as all sources together, and each
        source its part of them. Raises `UserError` where an epoch may be without a sequence.
        """
        chosen = list(range(len(sources)) if members is None else members)
        specs = [sources[number] for number in chosen]
        passes = [0.0] * len(sources)
        if all(source.weight is None for source in specs):
            own = _passes_by_tokens(specs, [tokens[number] for number in chosen])
        else:
            own = _passes_by_weight(specs, [counts[number] for number in chosen])
        for number, value in zip(chosen, own, strict=True):
            passes[number] = value
        taken = [number * count for number, count in zip(passes, counts, strict=True)]
        if max(taken) < 1:
            most = taken.index(max(taken))
            raise UserError(
                f"data.sources[{most}].epochs: {passes[most]:g} of its {counts[most]} sequences is less than one "
                "sequence per data epoch, and no other source has more: give at least "
                f"{math.ceil(1000 / counts[most]) / 1000:g}"
            )
        return Mixture(counts=tuple(counts), passes=tuple(passes), seed=seed)

    @property
    def repeats(self) -> bool:
        """Whether every data epoch has the same sequences."""
        return all(float(count).is_integer() for count in self.passes)

    def epoch(self, number: int) -> EpochSequences:
        """Return the sequences of data epoch `number`; a pure function."""
        first = np.cumsum([0, *self.counts]).astype(np.int32 if sum(self.counts) < 2**31 else np.int64)
        index: list[NDArray[np.integer]] = []
        passes: list[NDArray[np.int32]] = []
        for source, count in enumerate(self.counts):
            begin = math.floor(number * self.passes[source] * count)
            end = math.floor((number + 1) * self.passes[source] * count)
            while begin < end:
                current, offset = divmod(begin, count)
                taken = min(count - offset, end - begin)
                part = self._part(source, current, offset, taken).astype(first.dtype)
                index.append(first[source] + part)
                passes.append(np.full(taken, current, dtype=np.int32))
                begin += taken
        return EpochSequences(index=np.concatenate(index), passes=np.concatenate(passes))

    def _part(self, source: int, current: int, offset: int, taken: int) -> NDArray[np.int64]:
        count = self.counts[source]
        if taken == count:
            return np.arange(count)
        order = seeded_permutation("mixture", self.seed, source, current, size=count)
        return np.sort(order[offset : offset + taken])


def _passes_by_weight(sources: Sequence[SourceSpec], counts: Sequence[int]) -> list[float]:
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    return (weights / weights.sum() * sum(counts) / np.array(counts)).tolist()


def _passes_by_tokens(sources: Sequence[SourceSpec], tokens: Sequence[int]) -> list[float]:
    """Shares s of the epoch's tokens beside others that have T together: s T / (1 - S), where all shares sum to S.

    Where every source has a share, the shares are relative, and an epoch has as many tokens as all sources together.
    """
    shares = sum(source.token_share or 0.0 for source in sources)
    others = sum(
        (source.epochs or 1.0) * number
        for source, number in zip(sources, tokens, strict=True)
        if source.token_share is None
    )
    whole = others / (1 - shares) if others else sum(tokens) / shares
    return [
        source.epochs or 1.0 if source.token_share is None else source.token_share * whole / number
        for source, number in zip(sources, tokens, strict=True)
    ]
