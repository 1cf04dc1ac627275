"""The endless stream of bins: data epoch after data epoch, each in a drawn order, whatever the ranks and steps."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.random_numbers import hash_words
from bico_ds.config.sections.data import DataSpec
from bico_ds.data.loading.mixture import EpochSequences, Mixture
from bico_ds.data.loading.packing import PackPlan, build_pack_plan, seeded_permutation
from bico_ds.data.loading.plan_cache import cached_plan
from bico_ds.data.loading.sequences import Expand, Sequences


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stream stands: the next bin is number `bin` in the drawn order of data epoch `epoch`."""

    epoch: int = 0
    bin: int = 0


@dataclass(frozen=True, kw_only=True)
class StreamBins:
    """B bins taken from the stream, with N sequences in all.

    `source` and `sequence` [N] name a sequence of the source's `Sequences`, `passes` [N] is the number of the pass over its
    source, `length` [N] the room that it takes, in tokens; bin b has the entries `offsets[b]` … `offsets[b + 1] - 1`.
    """

    source: NDArray[np.int64]
    sequence: NDArray[np.int64]
    passes: NDArray[np.int64]
    length: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    sequences: EpochSequences
    plan: PackPlan
    # Of the plan's bins.
    order: NDArray[np.int64]


class BinStream:
    """Bins over the sequences of all sources, for objectives that share one expansion.

    Every data epoch packs its sequences anew where the mixture or `data.repack_every_epoch` asks for it; else the bins stay
    the same and only their order is drawn. Safe to use from several threads.
    """

    def __init__(
        self, sequences: list[Sequences], mixture: Mixture, expand: Expand, data: DataSpec, *, seed: int
    ) -> None:
        self._mixture, self._expand, self._data, self._seed = mixture, expand, data, seed
        lengths = [of_source.length for of_source in sequences]
        self._length = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
        self._first_of_source = np.cumsum([0, *map(len, lengths)])
        self._epochs: dict[int, _Epoch] = {}
        self._num_bins: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def same_bins_every_epoch(self) -> bool:
        return self._mixture.repeats and not self._data.repack_every_epoch

    def num_bins(self, epoch: int) -> int:
        """Return the number of bins of a data epoch; packing anew puts other sequences together, never into more bins."""
        if self._mixture.repeats:
            epoch = 0
        if epoch not in self._num_bins:
            self._num_bins[epoch] = self._epoch(epoch).plan.num_bins
        return self._num_bins[epoch]

    def plan(self, epoch: int) -> PackPlan:
        """Return the pack plan of a data epoch."""
        return self._epoch(epoch).plan

    def epoch_lengths(self, epoch: int) -> NDArray[np.int64]:
        """Return the room that the sequences of a data epoch take after `expand`, in tokens, int64 [N]."""
        return self._expand(self.sequence_lengths(epoch))

    def sequence_lengths(self, epoch: int) -> NDArray[np.int64]:
        """Return the tokens of the sequences of a data epoch before `expand`, int64 [N]."""
        return self._length[self._epoch(epoch).sequences.index].astype(np.int64)

    def sequence_sources(self, epoch: int) -> NDArray[np.int64]:
        """Return the number of the source of each sequence of a data epoch, int64 [N]."""
        return self._sources(self._epoch(epoch).sequences.index)

    def advance(self, position: Position, bins: int) -> Position:
        """Return the position `bins` bins later."""
        epoch, bin_number = position.epoch, position.bin + bins
        if self._mixture.repeats:
            more, bin_number = divmod(bin_number, self.num_bins(0))
            return Position(epoch=epoch + more, bin=bin_number)
        while bin_number >= self.num_bins(epoch):
            bin_number -= self.num_bins(epoch)
            epoch += 1
        return Position(epoch=epoch, bin=bin_number)

    def take(self, position: Position, count: int) -> StreamBins:
        """Return the `count` bins from `position` on, across the ends of epochs."""
        parts = []
        position = self.advance(position, 0)
        while count:
            taken = min(count, self.num_bins(position.epoch) - position.bin)
            parts.append(self._take(position, taken))
            position, count = self.advance(position, taken), count - taken
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        columns = ("source", "sequence", "passes", "length")
        return StreamBins(
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns},
        )

    def _take(self, position: Position, count: int) -> StreamBins:
        epoch = self._epoch(position.epoch)
        entries, sizes = epoch.plan.sequences_of(epoch.order[position.bin : position.bin + count])
        index = epoch.sequences.index[entries].astype(np.int64)
        source = self._sources(index)
        passes = epoch.sequences.passes[entries].astype(np.int64)
        if self._mixture.repeats:  # the sequences are those of epoch 0
            passes += position.epoch * np.array(self._mixture.passes, dtype=np.int64)[source]
        return StreamBins(
            source=source,
            sequence=index - self._first_of_source[source],
            passes=passes,
            length=self._expand(self._length[index].astype(np.int64)),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        )

    def _sources(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_of_source, index, side="right") - 1

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                built = self._build(number)
                self._epochs = {n: e for n, e in self._epochs.items() if abs(n - number) <= 1}
                self._epochs[number] = built
            return self._epochs[number]

    def _build(self, number: int) -> _Epoch:
        known = next(iter(self._epochs.values()), None)
        if known and self._mixture.repeats:
            sequences = known.sequences
        else:
            sequences = self._mixture.epoch(0 if self._mixture.repeats else number)
        if known and self.same_bins_every_epoch:
            plan = known.plan
        else:
            packed = 0 if self.same_bins_every_epoch else number
            plan = cached_plan(
                build_pack_plan,
                self._expand(self._length[sequences.index].astype(np.int64)),
                folder=self._data.cache_dir.here() / "plans",
                capacity=self._data.capacity,
                seed=int(hash_words("packing", self._seed, packed)[0]),
                max_documents_per_bin=self._data.max_documents_per_bin,
            )
        order = seeded_permutation("order", self._seed, number, size=plan.num_bins)
        return _Epoch(sequences=sequences, plan=plan, order=order)
