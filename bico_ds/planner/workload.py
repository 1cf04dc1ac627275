"""What goes through the model: the rows and pairs of an average micro-batch of each objective, and the steps of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.base import AttentionMode, ObjectiveSpec
from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import Recipe

_MOST_LENGTHS = 1 << 18  # a sample of so many documents has their mean within a per cent


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The N sequences of a data epoch that an objective takes from.

    `lengths` int64 [N]: their original tokens; `sources` int64 [N]: their sources' numbers; `passes`: over each source.
    `bins`: how many they are packed into; NaN: not known.
    """

    lengths: NDArray[np.int64]
    sources: NDArray[np.int64]
    passes: Sequence[float]
    bins: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The documents of a data epoch as the planner knows them.

    `lengths` int64 [D]: tokens per document, of all or of a sample, none above the recipe's capacity. `tokens`: of a whole
    data epoch; None: not known. `source`: for the report, where this was read, or that it is assumed. `passes`: over what
    `training.epochs` counts, in the data epoch. `compared`: the share of the tokens that `retention.on` names.
    `by_objective`: where objectives draw from different sources, what each draws, in the recipe's order; the rest is then
    that of the first.
    """

    lengths: NDArray[np.int64]
    tokens: int | None
    source: str
    passes: float = 1.0
    compared: float = 1.0
    by_objective: tuple[Texts, ...] = ()

    @classmethod
    def of(
        cls, lengths: NDArray[np.int64], *, source: str, passes: float = 1.0, compared: float = 1.0
    ) -> Texts:
        """All documents of a data epoch, of these lengths, int64 [documents]; of very many a sample is kept."""
        stride = -(-len(lengths) // _MOST_LENGTHS)
        return cls(
            lengths=lengths[::stride],
            tokens=int(lengths.sum()),
            source=source,
            passes=passes,
            compared=compared,
        )

    @classmethod
    def of_objectives(cls, recipe: Recipe, draw: Callable[[int], Drawn], *, source: str) -> Texts:
        """What each objective draws, by its number. Objectives with the same sources are taken to draw the same."""
        known: dict[tuple[int, ...], Texts] = {}
        members = [recipe.data.source_numbers(spec.sources) for spec in recipe.objectives]
        on = recipe.data.source_numbers(None if recipe.retention is None else recipe.retention.on)
        for number, numbers in enumerate(members):
            if numbers not in known:
                drawn, of = draw(number), recipe.training.epochs_of
                compared = drawn.lengths[np.isin(drawn.sources, on)].sum() / drawn.lengths.sum()
                passes = 1.0 if of is None else drawn.passes[recipe.data.source_names.index(of)]
                known[numbers] = cls.of(drawn.lengths, source=source, passes=passes, compared=float(compared))
        first = known[members[0]]
        return first if len(known) == 1 else replace(first, by_objective=tuple(known[n] for n in members))

    def drawn_by(self, objective: int) -> Texts:
        """Those that the objective of this number draws."""
        return self.by_objective[objective] if self.by_objective else self


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """An average micro-batch of one objective: `training.micro_batch_bins` bins.

    `kept_rows` and `live_rows` go through the model; `pairs` are (query, key) pairs that attention looks at, per head and
    layer, `span_pairs` those of them whose key is a live row; `head_rows` have a loss; `tokens` are original ones.
    `longest` is the longest document, in tokens of a bin, and `documents` their number. `probability`: the share of steps
    that are this objective's. `compared_rows` of the head rows are compared with the start model; `repeats_base`: its hidden
    states are computed, with the adapters switched off.
    """

    objective: str
    probability: float
    mode: AttentionMode
    documents: float
    longest: int
    tokens: float
    kept_rows: float
    live_rows: float
    pairs: float
    head_rows: float
    span_pairs: float = 0.0
    compared_rows: float = 0.0
    repeats_base: bool = False

    @property
    def rows(self) -> float:
        """Through the model."""
        return self.kept_rows + self.live_rows

    @property
    def mean_span(self) -> float:
        """Live rows of a span that is as long as all others."""
        return 2 * self.span_pairs / self.live_rows - 1 if self.span_pairs else 0.0


def assumed_texts(recipe: Recipe, *, length: int | None = None, tokens: int | None = None) -> Texts:
    """Documents of `length` tokens, by default as long as a bin, and `tokens` of a data epoch where they are known.

    Raises `UserError` for a length that no bin holds.
    """
    capacity = recipe.data.capacity
    if length is None:
        source = "assumed: each fills a bin, as not all sources are prepared here"
        return Texts(lengths=np.array([capacity]), tokens=tokens, source=source)
    if not 2 <= length <= capacity:
        raise UserError(f"--text-length {length}: must be from 2 to data.capacity ({capacity:,})")
    return Texts(lengths=np.array([length]), tokens=tokens, source=f"given: documents of {length:,} tokens")


def micro_batches(recipe: Recipe, texts: Texts, *, fullest: bool = False) -> tuple[MicroBatch, ...]:
    """One per objective, in the recipe's order: its spec's `cost` of the texts, scaled to `bin_room`."""
    names = objective_names(recipe.objectives)
    return tuple(
        _micro_batch(recipe, name, spec, texts.drawn_by(number), fullest=fullest)
        for number, (name, spec) in enumerate(zip(names, recipe.objectives, strict=True))
    )


def _micro_batch(
    recipe: Recipe, name: str, spec: ObjectiveSpec, texts: Texts, *, fullest: bool
) -> MicroBatch:
    # Only causal steps compare; each of theirs has the further pass, whatever rows it compares.
    compares = recipe.retention is not None and spec.attention == "causal"
    texts = replace(texts, lengths=_cut_to_fit(recipe, spec, texts.lengths))
    taken = _room(spec, texts.lengths)
    expansion = taken / float(texts.lengths.sum())
    room = recipe.training.micro_batch_bins * bin_room(recipe, texts, fullest=fullest, expansion=expansion)
    batch = average_batch(name, spec, texts.lengths, share=room / taken)
    return replace(
        batch,
        tokens=room / expansion,
        compared_rows=texts.compared * batch.head_rows if compares else 0.0,
        repeats_base=compares and recipe.retention is not None and recipe.retention.teacher is None,
    )


def _cut_to_fit(recipe: Recipe, spec: ObjectiveSpec, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lengths of what an objective draws of documents of these lengths, int64 [D], where it makes more of them.

    Each must fit a bin with its rows, and longer ones are cut by `data.overlong`. The BOS of pieces is not counted.
    """
    capacity = recipe.data.capacity

    def room_of(length: int) -> int:
        return round(_room(spec, np.array([length])))

    if room_of(int(lengths.max())) <= capacity:
        return lengths
    # One token at least: where none fits, the loader refuses the recipe.
    longest = max(1, bisect_right(range(1, capacity + 1), capacity, key=room_of))
    if recipe.data.overlong == "split":
        rests = lengths % longest
        return np.concatenate([np.repeat(longest, (lengths // longest).sum()), rests[rests > 0]])
    kept = lengths[lengths <= longest]
    return kept if recipe.data.overlong == "drop" and len(kept) else np.minimum(lengths, longest)


def average_batch(name: str, spec: ObjectiveSpec, lengths: NDArray[np.int64], *, share: float) -> MicroBatch:
    """A `share` of the documents of these lengths, int64 [D], by the spec's `cost`; none of its rows is compared."""
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)
    documents, cost = counts[distinct], spec.cost(distinct)
    return MicroBatch(
        objective=name,
        probability=spec.probability,
        mode=spec.attention,
        documents=share * len(lengths),
        longest=int(_room(spec, distinct[-1:])),
        tokens=share * float(lengths.sum()),
        kept_rows=share * float(documents @ cost.kept_rows),
        live_rows=share * float(documents @ cost.live_rows),
        pairs=share * float(documents @ cost.pairs),
        head_rows=share * float(documents @ cost.head_rows),
        span_pairs=0.0 if cost.span_pairs is None else share * float(documents @ cost.span_pairs),
    )


def _room(spec: ObjectiveSpec, lengths: NDArray[np.int64]) -> float:
    """What documents of these lengths take of bins together: each its tokens, or its rows where these are more."""
    distinct, counts = np.unique(lengths, return_counts=True)
    cost = spec.cost(distinct)
    return float(counts @ np.maximum(distinct, cost.kept_rows + cost.live_rows))


def bin_room(recipe: Recipe, texts: Texts, *, fullest: bool = False, expansion: float = 1.0) -> float:
    """Tokens of a bin. That packing fills them is an assumption: it does to more than 0.99 (docs/benchmarks/packing.md).

    Where `data.max_documents_per_bin` keeps them from being full: so many average texts, or of the `fullest` bin so many
    of the longest. `expansion`: how much room a text takes, by its tokens.
    """
    most = recipe.data.max_documents_per_bin
    if most is None:
        return recipe.data.capacity
    length = float(texts.lengths.max() if fullest else texts.lengths.mean())
    return min(recipe.data.capacity, most * length * expansion)


def steps_of_run(recipe: Recipe, texts: Texts, batches: Sequence[MicroBatch]) -> int | None:
    """Optimizer steps; None where the recipe counts epochs and the tokens of one are not known.

    `batches`: the objectives' average ones, with the probabilities of their steps.
    """
    if recipe.training.steps is not None:
        return recipe.training.steps
    if texts.tokens is None or recipe.training.epochs is None:
        return None
    epochs_per_bin = 0.0
    for number, batch in enumerate(batches):
        drawn = texts.drawn_by(number)
        assert drawn.tokens is not None, "objectives draw from sources that are known, or none does"
        tokens = batch.tokens / recipe.training.micro_batch_bins
        epochs_per_bin += batch.probability * drawn.passes * tokens / drawn.tokens
    per_step = recipe.training.global_batch_bins * epochs_per_bin
    return max(1, math.ceil(recipe.training.epochs / per_step - 1e-9))
