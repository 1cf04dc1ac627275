"""Global packing: best-fit decreasing over the length histogram of the complete data set.

What is packed are sequences: documents, or pieces of them. Sequences of one length are alike, and so are bins filled
alike, so the algorithm walks over (length, group of like bins) and never over sequences: its time depends on the
capacity, not on the size of the data. Which sequence goes where then takes a few array operations.

Legend: N sequences, B bins, S steps of the best-fit walk.
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
    """Which sequences share a bin, in CSR form: bin b holds `sequence_order[bin_offsets[b]:bin_offsets[b + 1]]`.

    `sequence_order` int32 or int64 [N], every sequence once; `bin_offsets` int64 [B + 1]; `fingerprint` identifies both.
    """

    sequence_order: NDArray[np.integer]
    bin_offsets: NDArray[np.int64]
    capacity: int
    fingerprint: str

    @property
    def num_bins(self) -> int:
        return len(self.bin_offsets) - 1

    def sequences_of(self, bins: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sequences of these bins, bin after bin, int64 [n], and how many each bin has, int64 [len(bins)]."""
        starts = self.bin_offsets[bins]
        counts = self.bin_offsets[bins + 1] - starts
        ends = np.cumsum(counts)
        index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        return self.sequence_order[index].astype(np.int64), counts


@dataclass(frozen=True, kw_only=True)
class BinGroups:
    """The steps of the best-fit walk, all int64 [S].

    Step s puts `copies[s]` sequences of `length[s]` into each of the bins `first_bin[s]` … `first_bin[s] + bins[s] - 1`,
    after the `before[s]` sequences that these hold already.
    """

    first_bin: NDArray[np.int64]
    bins: NDArray[np.int64]
    length: NDArray[np.int64]
    copies: NDArray[np.int64]
    before: NDArray[np.int64]
    num_bins: int


def build_pack_plan(
    lengths: NDArray[np.integer], *, capacity: int, seed: int, max_documents_per_bin: int | None = None
) -> PackPlan:
    """Pack sequences of these lengths, [N] in 1 … `capacity`, into bins; a pure function of its arguments.

    Best-fit decreasing; sequences of equal length are taken in an order drawn from `seed`, so that another seed puts other
    sequences together. Raises `ValueError` for a length outside 1 … `capacity`, and where there are no sequences.
    """
    if len(lengths) == 0:
        raise ValueError("there is nothing to pack: the data set has no sequences")
    histogram = _histogram(lengths, capacity)
    groups = pack_histogram(histogram, capacity=capacity, max_documents_per_bin=max_documents_per_bin)
    sequence_order, bin_offsets = _assign(groups, _sequences_by_length(lengths, capacity, seed))
    return PackPlan(
        sequence_order=sequence_order,
        bin_offsets=bin_offsets,
        capacity=capacity,
        fingerprint=fingerprint_of(sequence_order, bin_offsets),
    )


def fingerprint_of(sequence_order: NDArray[np.integer], bin_offsets: NDArray[np.int64]) -> str:
    """The `fingerprint` of the plan that has these columns."""
    digest = hashlib.blake2b(sequence_order.data, digest_size=16)
    digest.update(bin_offsets.data)
    return digest.hexdigest()


def pack_histogram(
    histogram: NDArray[np.integer], *, capacity: int, max_documents_per_bin: int | None = None
) -> BinGroups:
    """Best-fit decreasing of `histogram[length]` sequences of each length; O(lengths · log capacity) steps.

    Best fit takes the bins with the least space that suffices; one that took a sequence of this length has even less
    space, so it goes on taking until it is full: like bins fill alike, `space // length` copies at once. Each such step
    more than halves the space that a length up to this one can use, which bounds the number of steps.
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
            # `full` bins take all the copies they can; sequences that do not fill one more go into one bin
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
    """Groups of like bins by the space left in each: (first bin, bins, sequences in each)."""

    def __init__(self, capacity: int, *, least_space: int, most: int) -> None:
        self.num_bins = 0
        self._capacity, self._least_space, self._most = capacity, least_space, most
        self._groups: dict[int, list[tuple[int, int, int]]] = {}
        # The keys of `_groups`, ascending.
        self._spaces: list[int] = []

    def take(self, length: int, count: int) -> tuple[int, int, int, int]:
        """Take out a group with the least sufficient space; without one, open the bins that `count` sequences need."""
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

    def put(self, space: int, first: int, bins: int, sequences: int) -> None:
        """Give a group back, unless no sequence will fit."""
        if bins == 0 or space < self._least_space or sequences == self._most:
            return
        if space not in self._groups:
            self._groups[space] = []
            insort(self._spaces, space)
        self._groups[space].append((first, bins, sequences))


def seeded_permutation(purpose: str, *words: int, size: int) -> NDArray[np.int64]:
    """Return a permutation int64 [size] that is a function of (purpose, words, size)."""
    key = hash_words(purpose, *words)
    return np.argsort(stream(key, np.arange(size)), kind="stable")


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))


def _histogram(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    shortest, longest = int(np.min(lengths)), int(np.max(lengths))
    if shortest < 1 or longest > capacity:
        number = int(np.argmin(lengths) if shortest < 1 else np.argmax(lengths))
        raise ValueError(
            f"sequence {number} has length {lengths[number]}, not in 1 … {capacity} (the capacity)"
        )
    histogram = np.zeros(capacity + 1, dtype=np.int64)
    for part in _chunks(len(lengths)):
        histogram += np.bincount(lengths[part], minlength=capacity + 1)
    return histogram


def _sequences_by_length(lengths: NDArray[np.integer], capacity: int, seed: int) -> NDArray[np.integer]:
    """Sequences by falling length, equal ones in a drawn order: one sort of words (length | draw | number)."""
    size = len(lengths)
    index_bits, length_bits = max(size - 1, 1).bit_length(), capacity.bit_length()
    draw_bits = 64 - index_bits - length_bits
    assert draw_bits >= 8, f"{size} sequences of up to {capacity} tokens are more than one word can order"
    key = hash_words("pack", seed)
    words = np.empty(size, dtype=np.uint64)
    for part in _chunks(size):
        numbers = np.arange(part.start, part.stop, dtype=np.uint64)
        draws = stream(key, numbers) >> np.uint64(64 - draw_bits) << np.uint64(index_bits)
        falling = (capacity - lengths[part].astype(np.int64)).astype(np.uint64)
        words[part] = (falling << np.uint64(64 - length_bits)) | draws | numbers
    words.sort()
    ordered: NDArray[np.integer] = np.empty(size, dtype=np.int32 if size < 2**31 else np.int64)
    for part in _chunks(size):
        ordered[part] = words[part] & np.uint64((1 << index_bits) - 1)
    return ordered


def _assign(
    groups: BinGroups, sequences: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Put `sequences` (in the order in which the walk takes them) into the bins: the CSR arrays of the plan."""
    change = np.zeros(groups.num_bins + 1, dtype=np.int64)
    np.add.at(change, groups.first_bin, groups.copies)
    np.add.at(change, groups.first_bin + groups.bins, -groups.copies)
    bin_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.cumsum(change[:-1]))])

    sequence_order = np.empty_like(sequences)
    taken = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups.bins * groups.copies)])
    step = 0
    while step < len(groups.bins):
        last = max(step + 1, int(np.searchsorted(taken, taken[step] + _CHUNK, side="right")) - 1)
        part = slice(step, last)
        bins = groups.bins[part]
        ends = np.cumsum(bins)
        # From here on one entry per (step, bin).
        bin_ = np.arange(ends[-1]) + np.repeat(groups.first_bin[part] - (ends - bins), bins)
        position = bin_offsets[bin_] + np.repeat(groups.before[part], bins)
        copies = np.repeat(groups.copies[part], bins)
        first = np.cumsum(copies) - copies
        target = np.repeat(position - first, copies) + np.arange(taken[last] - taken[step])
        sequence_order[target] = sequences[taken[step] : taken[last]]
        step = last
    return sequence_order, bin_offsets
