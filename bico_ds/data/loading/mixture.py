"""Mixtures: how often each source passes in a data epoch, and which of its rows that are.

A source is an endless stream of passes over its rows; a data epoch takes the next `passes · rows` of it.
Whole passes take every row; of a pass that an epoch boundary cuts, a seeded permutation decides which rows
come first, so that over time every row of a source is seen equally often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.schema import SourceSpec
from bico_ds.data.loading.packing import seeded_permutation


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """The N rows of one data epoch: `row` [N] counts through all sources' rows, `passes` [N] is the number
    of the pass over its source, the epoch that masks are keyed by.
    """

    row: NDArray[np.integer]
    passes: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`passes[s]` passes over source s, of `rows[s]` rows, in a data epoch."""

    rows: tuple[int, ...]
    passes: tuple[float, ...]
    seed: int

    @staticmethod
    def of(sources: Sequence[SourceSpec], rows: Sequence[int], seed: int) -> Mixture:
        """By `epochs` (default 1) of each source; or by `weight`: shares of as many rows as all sources
        have. UserError where an epoch may be without a row.
        """
        if all(source.weight is None for source in sources):
            passes = [source.epochs or 1.0 for source in sources]
        else:
            weights = np.array([source.weight for source in sources], dtype=np.float64)
            passes = (weights / weights.sum() * sum(rows) / np.array(rows)).tolist()
        taken = [count * number for count, number in zip(passes, rows, strict=True)]
        if max(taken) < 1:
            most = taken.index(max(taken))
            raise UserError(
                f"data.sources[{most}].epochs: {passes[most]:g} of its {rows[most]} rows is less than one row a data "
                f"epoch, and no other source has more: give at least {math.ceil(1000 / rows[most]) / 1000:g}"
            )
        return Mixture(rows=tuple(rows), passes=tuple(passes), seed=seed)

    @property
    def repeats(self) -> bool:
        """Whether every data epoch has the same rows."""
        return all(float(count).is_integer() for count in self.passes)

    def epoch(self, number: int) -> EpochRows:
        """Return the rows of data epoch `number`; a pure function."""
        first_row = np.cumsum([0, *self.rows]).astype(np.int32 if sum(self.rows) < 2**31 else np.int64)
        row: list[NDArray[np.integer]] = []
        passes: list[NDArray[np.int32]] = []
        for source, count in enumerate(self.rows):
            begin = math.floor(number * self.passes[source] * count)
            end = math.floor((number + 1) * self.passes[source] * count)
            while begin < end:
                current, offset = divmod(begin, count)
                taken = min(count - offset, end - begin)
                row.append(
                    first_row[source] + self._part(source, current, offset, taken).astype(first_row.dtype)
                )
                passes.append(np.full(taken, current, dtype=np.int32))
                begin += taken
        return EpochRows(row=np.concatenate(row), passes=np.concatenate(passes))

    def _part(self, source: int, current: int, offset: int, taken: int) -> NDArray[np.int64]:
        count = self.rows[source]
        if taken == count:
            return np.arange(count)
        order = seeded_permutation("mixture", self.seed, source, current, size=count)
        return np.sort(order[offset : offset + taken])
