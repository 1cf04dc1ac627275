"""What of the data can never be learned from: documents that cutting leaves without a target, and an unlearned stop token.

Nearly always the last tokens of a sequence decide, and only those are read then. Objectives that do not tell what they
predict (no `TargetRule`) are left out.

Shape legend: N sequences, D documents of a source, R rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import DataSpec
from bico_ds.data.loading.sequences import Sequences, cut_documents
from bico_ds.data.store import TokenStore
from bico_ds.documents import Documents
from bico_ds.objectives.base import Objective, TargetRule

# Enough for the end-of-text token before the line end that some chat templates write.
_TAIL = 8
# Tokens that are read at once.
_PART = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CutSource:
    """A source, and what cutting made of its documents: the sequences, by the number of each objective that has them."""

    number: int
    name: str
    store: TokenStore
    sequences: Mapping[int, Sequences]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What documents hold for each rule.

    `target` bool [R, D]: a token that it may predict; `learned` bool [R, D]: a stop token that it may predict, among the
    last tokens, or wherever a reply ends; `stop` bool [D]: a stop token among the last tokens. `empty` int64 [R]: the
    sequences that were looked at and have no target.
    """

    target: NDArray[np.bool_]
    learned: NDArray[np.bool_]
    stop: NDArray[np.bool_]
    empty: NDArray[np.int64]


def check_targets(objectives: Sequence[Objective], sources: Sequence[CutSource], data: DataSpec) -> list[str]:
    """Return the warnings about each source: documents without a target for an objective, and the stop token.

    Raises `UserError` where no document of a source has a target for an objective that draws from it.
    """
    known = {number: rule for number, rule in enumerate(objectives) if _tells(rule)}
    warnings = []
    for source in sources:
        numbers = [number for number in known if number in source.sequences]
        rules = [known[number] for number in numbers]
        if not rules:
            continue
        whole, left = _before_and_after(rules, source, [source.sequences[n] for n in numbers])
        for index, number in enumerate(numbers):
            name = f"objectives[{number}] ({objectives[number].name}), which predicts {rules[index].predicts}"
            warnings += _without_target(whole.target[index], left.target[index], source.name, name, data)
            if data.overlong == "split":
                warnings += _empty_pieces(
                    int(left.empty[index]), len(source.sequences[number]), source.name, name
                )
        # An objective without a rule may predict it. Sampled text ends where the model ended it, or is cut, as it should be.
        if len(rules) == len(source.sequences) and data.sources[source.number].sampled is None:
            warnings += _unlearned_stop(whole, left, source, data)
    return warnings


def _tells(objective: Objective) -> TypeGuard[TargetRule]:
    """Whether it has a rule about its own `build`, and not only one inherited from a class whose `build` it overrides."""
    if not isinstance(objective, TargetRule):
        return False
    names = ("possible_targets", "build")
    rule, build = (
        next((n for n, cls in enumerate(type(objective).__mro__) if name in vars(cls)), 0) for name in names
    )
    return rule <= build


def _without_target(
    whole: NDArray[np.bool_], left: NDArray[np.bool_], source: str, objective: str, data: DataSpec
) -> list[str]:
    """The warning about one source and objective, from what its documents hold before and after cutting, bool [D] each."""
    documents, without, cut = len(left), int((~left).sum()), int((whole & ~left).sum())
    if not without:
        return []
    reasons = [f"{without - cut:,} hold no such token"] if cut < without else []
    reasons += [f"{cut:,} lose theirs by {_cutting(data)}"] if cut else []
    message = (
        f"source '{source}': {without:,} of {documents:,} documents have no target for {objective}: "
        f"{', '.join(reasons)}"
    )
    advice = f"; {_keep_more(data)}" if cut else ""
    if without == documents:
        raise UserError(message + (advice or "; train on other data, or with another objective"))
    return [f"{message}{advice}"]


def _empty_pieces(empty: int, pieces: int, source: str, objective: str) -> list[str]:
    """The warning about long prompts, say, of which most pieces are without a target although their documents have one."""
    if 2 * empty <= pieces:
        return []
    return [
        f"source '{source}': {empty:,} of {pieces:,} pieces have no target for {objective}; "
        "a step of such pieces alone makes no update; raise data.capacity"
    ]


def _cutting(data: DataSpec) -> str:
    return f"data.overlong={data.overlong} at data.capacity={data.capacity}"


def _keep_more(data: DataSpec) -> str:
    return "raise data.capacity" + ("" if data.overlong == "split" else ", or set data.overlong=split")


def _unlearned_stop(whole: _Found, left: _Found, source: CutSource, data: DataSpec) -> list[str]:
    """The warning about a source where most documents that are learned from do not teach the model to stop."""
    learned_from, learned = left.target.any(axis=0), left.learned.any(axis=0)
    others = learned_from & ~learned
    documents = int(learned_from.sum())
    if 2 * int(others.sum()) <= documents:
        return []
    token, predicted = f"the stop token (id {source.store.manifest.eos_id})", whole.learned.any(axis=0)
    reasons = {
        f"do not end in {token} (prepare them with add_eos, or a chat template that writes it)": ~whole.stop,
        f"end in {token}, which no objective predicts (masks leave special tokens out: add {{kind: ntp}} to objectives)": (
            whole.stop & ~predicted
        ),
        f"lose {token} by {_cutting(data)} ({_keep_more(data)})": whole.stop & predicted,
    }
    counts = {reason: int((others & holds).sum()) for reason, holds in reasons.items()}
    return [
        f"source '{source.name}': {documents - int(others.sum()):,} of {documents:,} documents teach the model to stop: "
        + "; ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    ]


def _before_and_after(
    rules: Sequence[TargetRule], source: CutSource, cut: Sequence[Sequences]
) -> tuple[_Found, _Found]:
    """What the documents hold as they are, and what the sequences of each rule have left of it."""
    lengths = source.store.lengths
    as_they_are = cut_documents(lengths, longest=_PART, overlong="split")
    whole = _find(rules, source, as_they_are, np.arange(len(as_they_are)))
    left = replace(
        whole,
        target=np.zeros_like(whole.target),
        learned=np.zeros_like(whole.learned),
        empty=np.zeros_like(whole.empty),
    )
    for index, (rule, sequences) in enumerate(zip(rules, cut, strict=True)):
        is_part = sequences.length < lengths[sequences.document]
        parts = _find([rule], source, sequences, np.flatnonzero(is_part))
        left.empty[index] = parts.empty[0]
        uncut = sequences.document[~is_part]
        for after, before, of_parts in (
            (left.target, whole.target, parts.target),
            (left.learned, whole.learned, parts.learned),
        ):
            after[index] = of_parts[0]
            after[index, uncut] = before[index, uncut]
    return whole, left


def _find(
    rules: Sequence[TargetRule], source: CutSource, sequences: Sequences, numbers: NDArray[np.int64]
) -> _Found:
    """What the sequences of these numbers hold: by their last tokens, or else by all of them."""
    documents = len(source.store)
    found = _Found(
        target=np.zeros((len(rules), documents), dtype=bool),
        learned=np.zeros((len(rules), documents), dtype=bool),
        stop=np.zeros(documents, dtype=bool),
        empty=np.zeros(len(rules), dtype=np.int64),
    )
    has_target = np.zeros((len(rules), len(sequences)), dtype=bool)
    tails = np.minimum(sequences.length, _TAIL)
    last = replace(sequences, start=sequences.start + sequences.length - tails, length=tails, bos_id=None)
    for chosen, texts in _read(source, last, numbers):
        ids, is_stop = sequences.document[chosen], texts.token_ids == source.store.manifest.eos_id
        found.stop[ids[_any(is_stop, texts)]] = True
        for index, rule in enumerate(rules):
            possible = _possible(rule, texts)
            has_target[index, chosen] = _any(possible, texts)
            # In place, since several sequences may be of one document.
            found.learned[index, ids[_any(possible & is_stop, texts)]] = True
    for index, rule in enumerate(rules):
        is_open = ~has_target[index, numbers]
        if getattr(rule, "reads_replies", False):  # an earlier reply may teach to stop
            is_open |= ~found.learned[index, sequences.document[numbers]]
        for chosen, texts in _read(source, sequences, numbers[is_open & (sequences.length[numbers] > _TAIL)]):
            possible = _possible(rule, texts)
            has_target[index, chosen] = _any(possible, texts)
            stops = possible & (texts.token_ids == source.store.manifest.eos_id)
            found.learned[index, sequences.document[chosen][_any(stops, texts)]] = True
        found.target[index, sequences.document[has_target[index]]] = True
        found.empty[index] = int((~has_target[index, numbers]).sum())
    return found


def _read(
    source: CutSource, sequences: Sequences, numbers: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Documents]]:
    """The sequences of these numbers, some at a time."""
    size = max(1, _PART // int(sequences.length[numbers].max(initial=1)))
    for begin in range(0, len(numbers), size):
        chosen = numbers[begin : begin + size]
        yield chosen, sequences.read(chosen, source.store, source=source.number)


def _possible(rule: TargetRule, documents: Documents) -> NDArray[np.bool_]:
    possible = np.asarray(rule.possible_targets(documents))
    if possible.shape != documents.token_ids.shape or possible.dtype != bool:
        raise UserError(
            f"{type(rule).__name__}: possible_targets() must give one bool per token, "
            f"got {possible.dtype} of shape {possible.shape} for {len(documents.token_ids)} tokens"
        )
    return possible


def _any(flags: NDArray[np.bool_], documents: Documents) -> NDArray[np.bool_]:
    """Whether any token of each document has its flag set."""
    return np.logical_or.reduceat(flags, documents.offsets[:-1])
