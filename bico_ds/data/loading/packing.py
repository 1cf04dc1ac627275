"""Global packing: best-fit decreasing over the length histogram of a whole data set.

Rows of one length are alike, and so are bins filled alike, so the algorithm walks over (length, group of
like bins) and never over rows: its time depends on the capacity, not on the size of the data. Which row
goes where is then a handful of array operations.

Legend: R rows, B bins, S steps of the best-fit walk.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.random_numbers import hash_words, stream

_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Bins over R rows, in CSR form: bin b holds rows `row_order[bin_offsets[b]:bin_offsets[b + 1]]`.

    `row_order` int32 or int64 [R], every row once; `bin_offsets` int64 [B + 1]; `fingerprint` identifies
    both.
    """

    row_order: NDArray[np.integer]
    bin_offsets: NDArray[np.int64]
    capacity: int
    fingerprint: str

    @property
    def num_bins(self) -> int:
        return len(self.bin_offsets) - 1

    def rows_of(self, bins: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of these bins, one bin after the other, and the number of rows in each."""
        starts = self.bin_offsets[bins]
        counts = self.bin_offsets[bins + 1] - starts
        ends = np.cumsum(counts)
        index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        return self.row_order[index].astype(np.int64), counts


@dataclass(frozen=True, kw_only=True)
class BinGroups:
    """The best-fit walk: step s puts `copies[s]` rows of `length[s]` into each of the bins `first_bin[s]` …
    `first_bin[s] + bins[s] - 1`, behind the `before[s]` rows that these hold already. All int64 [S]."""

    first_bin: NDArray[np.int64]
    bins: NDArray[np.int64]
    length: NDArray[np.int64]
    copies: NDArray[np.int64]
    before: NDArray[np.int64]
    num_bins: int


def build_pack_plan(
    row_lengths: NDArray[np.integer], *, capacity: int, seed: int, max_documents_per_bin: int | None = None
) -> PackPlan:
    """Pack rows of these lengths (1 … capacity) into bins; a pure function of its arguments.

    Best-fit decreasing; rows of equal length are taken in an order drawn from `seed`, so that another seed
    draws other bin mates. Raises ValueError for a length outside 1 … capacity, and where there are no rows.
    """
    if len(row_lengths) == 0:
        raise ValueError("there is nothing to pack: the data set has no rows")
    histogram = _histogram(row_lengths, capacity)
    groups = pack_histogram(histogram, capacity=capacity, max_documents_per_bin=max_documents_per_bin)
    row_order, bin_offsets = _assign(groups, _rows_by_length(row_lengths, capacity, seed))
    digest = hashlib.blake2b(row_order.data, digest_size=16)
    digest.update(bin_offsets.data)
    return PackPlan(
        row_order=row_order, bin_offsets=bin_offsets, capacity=capacity, fingerprint=digest.hexdigest()
    )


def pack_histogram(
    histogram: NDArray[np.integer], *, capacity: int, max_documents_per_bin: int | None = None
) -> BinGroups:
    """Best-fit decreasing of `histogram[length]` rows of each length; O(lengths · log capacity) steps.

    Best fit takes the bins with the least space that suffices; one that took a row of this length has less
    space still, so it goes on taking until it is full: like bins fill alike, `space // length` copies at
    once. Each such step more than halves the space that a length up to this one can use, which bounds the
    number of steps.
    """
    lengths = np.flatnonzero(histogram)[::-1].tolist()
    most = max_documents_per_bin or int(np.sum(histogram))
    open_bins = _OpenBins(capacity, least_space=lengths[-1], most=most)
    steps: list[tuple[int, int, int, int, int]] = []
    for length in lengths:
        count = int(histogram[length])
        while count:
            space, first, bins, before = open_bins.take(length, count)
            copies = min(space // length, most - before)
            full = min(bins, count // copies)
            # `full` bins take all the copies they can; rows that do not fill one more go into one bin
            for taken, each in ((full, copies), (1 if full < bins else 0, count - full * copies)):
                if taken and each:
                    steps.append((first, taken, length, each, before))
                    open_bins.put(space - each * length, first, taken, before + each)
                    count -= taken * each
                    first, bins = first + taken, bins - taken
            open_bins.put(space, first, bins, before)
    columns = np.array(steps, dtype=np.int64).T
    return BinGroups(
        first_bin=columns[0],
        bins=columns[1],
        length=columns[2],
        copies=columns[3],
        before=columns[4],
        num_bins=open_bins.num_bins,
    )


class _OpenBins:
    """Groups of like bins by the space left in each: (first bin, bins, rows in each)."""

    def __init__(self, capacity: int, *, least_space: int, most: int) -> None:
        self.num_bins = 0
        self._capacity, self._least_space, self._most = capacity, least_space, most
        self._groups: dict[int, list[tuple[int, int, int]]] = {}
        self._spaces: list[int] = []  # its keys, ascending

    def take(self, length: int, count: int) -> tuple[int, int, int, int]:
        """Take out a group with the least sufficient space; without one, open the bins that `count` rows
        need."""
        index = bisect_left(self._spaces, length)
        if index == len(self._spaces):
            first, bins = self.num_bins, -(-count // min(self._capacity // length, self._most))
            self.num_bins += bins
            return self._capacity, first, bins, 0
        space = self._spaces[index]
        group = self._groups[space].pop()
        if not self._groups[space]:
            del self._groups[space], self._spaces[index]
        return (space, *group)

    def put(self, space: int, first: int, bins: int, rows: int) -> None:
        """Give a group back, unless no row will fit."""
        if bins == 0 or space < self._least_space or rows == self._most:
            return
        if space not in self._groups:
            self._groups[space] = []
            insort(self._spaces, space)
        self._groups[space].append((first, bins, rows))


def seeded_permutation(purpose: str, *words: int, size: int) -> NDArray[np.int64]:
    """Return a permutation int64 [size] that is a function of (purpose, words, size)."""
    key = hash_words(purpose, *words)
    return np.argsort(stream(key, np.arange(size)), kind="stable")


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))


def _histogram(row_lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    shortest, longest = int(np.min(row_lengths)), int(np.max(row_lengths))
    if shortest < 1 or longest > capacity:
        row = int(np.argmin(row_lengths) if shortest < 1 else np.argmax(row_lengths))
        raise ValueError(f"row {row} has length {row_lengths[row]}, not in 1 … {capacity} (the capacity)")
    histogram = np.zeros(capacity + 1, dtype=np.int64)
    for part in _chunks(len(row_lengths)):
        histogram += np.bincount(row_lengths[part], minlength=capacity + 1)
    return histogram


def _rows_by_length(row_lengths: NDArray[np.integer], capacity: int, seed: int) -> NDArray[np.integer]:
    """Rows by falling length, equal ones in a drawn order: one sort of words (length | draw | row)."""
    size = len(row_lengths)
    row_bits, length_bits = max(size - 1, 1).bit_length(), capacity.bit_length()
    draw_bits = 64 - row_bits - length_bits
    assert draw_bits >= 8, f"{size} rows of up to {capacity} tokens are more than one word can order"
    key = hash_words("pack", seed)
    words = np.empty(size, dtype=np.uint64)
    for part in _chunks(size):
        rows = np.arange(part.start, part.stop, dtype=np.uint64)
        draws = stream(key, rows) >> np.uint64(64 - draw_bits) << np.uint64(row_bits)
        falling = (capacity - row_lengths[part].astype(np.int64)).astype(np.uint64)
        words[part] = (falling << np.uint64(64 - length_bits)) | draws | rows
    words.sort()
    ordered: NDArray[np.integer] = np.empty(size, dtype=np.int32 if size < 2**31 else np.int64)
    for part in _chunks(size):
        ordered[part] = words[part] & np.uint64((1 << row_bits) - 1)
    return ordered


def _assign(groups: BinGroups, rows: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Deal `rows` (in the order in which the walk takes them) to the bins: the CSR arrays of the plan."""
    change = np.zeros(groups.num_bins + 1, dtype=np.int64)
    np.add.at(change, groups.first_bin, groups.copies)
    np.add.at(change, groups.first_bin + groups.bins, -groups.copies)
    bin_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.cumsum(change[:-1]))])

    row_order = np.empty_like(rows)
    taken = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups.bins * groups.copies)])
    step = 0
    while step < len(groups.bins):
        last = max(step + 1, int(np.searchsorted(taken, taken[step] + _CHUNK, side="right")) - 1)
        part = slice(step, last)
        bins = groups.bins[part]
        ends = np.cumsum(bins)  # one entry per (step, bin)
        bin_ = np.arange(ends[-1]) + np.repeat(groups.first_bin[part] - (ends - bins), bins)
        place = bin_offsets[bin_] + np.repeat(groups.before[part], bins)
        copies = np.repeat(groups.copies[part], bins)
        first_row = np.cumsum(copies) - copies
        target = np.repeat(place - first_row, copies) + np.arange(taken[last] - taken[step])
        row_order[target] = rows[taken[step] : taken[last]]
        step = last
    return row_order, bin_offsets
