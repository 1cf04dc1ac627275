"""`AttentionPlan`: what every query of a batch may see; built once per batch, on the CPU.

Row order of the batch it describes: `[kept tokens by document | live placeholders by document]`.

* A *kept* token is an unmasked one: a query and a key.
* A *live* placeholder is a masked token whose successor is masked too: its output predicts that successor,
  so it is a query, but no query may attend to it (BICO, arXiv 2311.07468, section 3).
* *Dead* placeholders (masked, successor not masked) influence nothing and are not in the batch.
* Live rows may form *spans*: then each is a key, too, for itself and for the later rows of its span, by the forward
  rotation (part B of GLM's blank infilling, arXiv 2103.10360, section 2.1). No kept row ever sees a live one.

Kept keys at positions up to a query's own take the forward rotation, later ones the reversed rotation. For kept token j
of a document (from 0) that boundary is `j + 1` keys; for a live placeholder it is its `live_split`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mode = Literal["causal", "bidirectional"]
Lengths: TypeAlias = "Tensor | NDArray[np.integer] | Sequence[int]"


@dataclass(frozen=True, kw_only=True)
class PlanOutline:
    """What is known of a plan without reading its tensors, on whatever device they are; a layout must agree with it.

    `digest`: of all that `build_plan` was given.
    """

    mode: Mode
    num_documents: int
    num_kept: int
    num_live: int
    max_seqlen: int
    digest: int

    @property
    def num_rows(self) -> int:
        """Rows of q, k, v and out: kept and live."""
        return self.num_kept + self.num_live


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Visibility of one packed batch: D documents, `num_kept` kept rows, then `num_live` live rows.

    `cu_seqlens` int32 [D+1]: first kept row of each document, and the end; `max_seqlen`: most kept tokens
    of a document.

    The strictly anti-causal pass runs as a causal one over flipped rows: `flip_rows` int64 [M] holds,
    document by document, the query rows `e-2 … s` of a document `[s, e)`, and `flip_key_rows` [M] the key
    row of each, one further. `flip_cu_seqlens` int32 and `flip_max_seqlen` describe that packing, in which
    documents of length 1 are left out. In causal mode M is 0. `flip_places` int32 [num_kept]: where in `flip_rows` each
    kept row stands, -1 for those that do not: the last of each document.

    `live_document` int64 [num_live]: each live row's document. `live_split` int64 [num_live]: how many
    kept tokens of it lie at or before the row's position.

    `span_cu_seqlens` int32 [S+1]: bounds of the spans, counted in live rows: 0 … `num_live`. None: live rows are no keys.

    `num_pairs` counts the (query, key) pairs of which the query sees the key, per head and layer. `digest` tells
    plans of other documents, other live rows or other spans apart.
    """

    mode: Mode
    cu_seqlens: Tensor
    max_seqlen: int
    flip_rows: Tensor
    flip_key_rows: Tensor
    flip_places: Tensor
    flip_cu_seqlens: Tensor
    flip_max_seqlen: int
    live_document: Tensor
    live_split: Tensor
    span_cu_seqlens: Tensor | None
    num_kept: int
    num_live: int
    num_pairs: int
    digest: int

    @property
    def num_rows(self) -> int:
        """Rows of q, k, v and out: kept and live."""
        return self.num_kept + self.num_live

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def outline(self) -> PlanOutline:
        return PlanOutline(
            mode=self.mode,
            num_documents=self.num_documents,
            num_kept=self.num_kept,
            num_live=self.num_live,
            max_seqlen=self.max_seqlen,
            digest=self.digest,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlan:
        """The same plan with its tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


Value = TypeVar("Value")


def map_tensors(value: Value, transform: Callable[[Tensor], Tensor]) -> Value:
    """The same value with every tensor in it transformed, however deep in dataclasses and tuples."""
    mapped: Any = value
    if isinstance(value, Tensor):
        mapped = transform(value)
    elif isinstance(value, tuple):
        mapped = tuple(map_tensors(part, transform) for part in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: map_tensors(getattr(value, field.name), transform) for field in fields(value)}
        mapped = replace(value, **parts)
    return mapped


def build_plan(
    mode: Mode,
    *,
    kept_lengths: Lengths,
    live_document: Lengths | None = None,
    live_split: Lengths | None = None,
    live_spans: Lengths | None = None,
) -> AttentionPlan:
    """The plan of one batch.

    `kept_lengths` int [D]: kept tokens of each document, each at least 1, in all below 2^31. `live_document` int
    [N_live]: document index of each live row, non-decreasing. `live_split` int [N_live]: kept tokens of its
    document at positions up to the row's, in 1 … kept length (a document's first token is never masked),
    non-decreasing within a document. Causal mode has no live rows, and no batch is empty.

    `live_spans` int [S]: lengths, each at least 1 and in all N_live, of consecutive live rows of one document that see
    themselves and the earlier ones among them; their positions must increase. None: live rows are no keys.

    Raises `ValueError` where an input breaks these rules, naming the document or row that does.
    """
    if mode not in ("causal", "bidirectional"):
        raise ValueError(f"attention mode must be 'causal' or 'bidirectional', got {mode!r}")
    kept = _as_int64(kept_lengths, "kept_lengths")
    document = _as_int64(live_document if live_document is not None else (), "live_document")
    split = _as_int64(live_split if live_split is not None else (), "live_split")
    spans = None if live_spans is None else _as_int64(live_spans, "live_spans")
    _check_kept(kept)
    _check_live(mode, kept, document, split)
    if spans is not None:
        _check_spans(spans, document)

    cu_seqlens = _cumulative(kept)
    flipped = kept - 1 if mode == "bidirectional" else np.zeros(0, np.int64)
    starts = cu_seqlens[:-1][: flipped.size]
    present = flipped > 0
    flip_rows = _flipped_ranges(starts[present], flipped[present])
    return AttentionPlan(
        mode=mode,
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(kept.max()),
        flip_rows=torch.from_numpy(flip_rows),
        flip_key_rows=torch.from_numpy(flip_rows + 1),
        flip_places=torch.from_numpy(_places(flip_rows, int(cu_seqlens[-1]))),
        flip_cu_seqlens=torch.from_numpy(_cumulative(flipped[present]).astype(np.int32)),
        flip_max_seqlen=int(flipped.max(initial=0)),
        live_document=torch.from_numpy(document),
        live_split=torch.from_numpy(split),
        span_cu_seqlens=None if spans is None else torch.from_numpy(_cumulative(spans).astype(np.int32)),
        num_kept=int(cu_seqlens[-1]),
        num_live=document.size,
        num_pairs=_visible_pairs(mode, kept, document) + (0 if spans is None else _causal_pairs(spans)),
        digest=zlib.crc32(
            np.concatenate([kept, document, split, *([] if spans is None else [spans])]).tobytes()
        ),
    )


def _visible_pairs(mode: Mode, kept: NDArray[np.int64], live_document: NDArray[np.int64]) -> int:
    """Those with a kept key."""
    if mode == "causal":
        return _causal_pairs(kept)
    return int((kept * kept).sum() + kept[live_document].sum())


def _causal_pairs(lengths: NDArray[np.int64]) -> int:
    return int((lengths * (lengths + 1) // 2).sum())


def _as_int64(values: Lengths, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64)


def _check_kept(kept: NDArray[np.int64]) -> None:
    if kept.size == 0:
        raise ValueError("kept_lengths is empty: a batch needs at least one document")
    if (kept < 1).any():
        index = int(np.argmax(kept < 1))
        raise ValueError(
            f"document {index} of the batch has {kept[index]} kept tokens: every document needs at least one "
            "unmasked token, or its queries have no visible key"
        )
    if kept.sum() >= 2**31:
        raise ValueError(f"a batch of {kept.sum()} kept tokens does not fit the kernels' int32 offsets")


def _check_live(
    mode: Mode, kept: NDArray[np.int64], document: NDArray[np.int64], split: NDArray[np.int64]
) -> None:
    if document.size != split.size:
        raise ValueError(f"live_document has {document.size} entries, live_split has {split.size}")
    if document.size == 0:
        return
    if mode == "causal":
        raise ValueError(f"causal mode has no live placeholders, got {document.size}")
    if document.min() < 0 or document.max() >= kept.size:
        raise ValueError(
            f"live_document must lie in 0 … {kept.size - 1}, got {document.min()} … {document.max()}"
        )
    outside = (split < 1) | (split > kept[document])
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(
            f"live row {row} of document {document[row]}: live_split is {split[row]}, must lie in 1 … "
            f"{kept[document[row]]} (the document's first token is never masked)"
        )
    step = np.diff(document)
    unordered = (step < 0) | ((step == 0) & (np.diff(split) < 0))
    if unordered.any():
        row = int(np.argmax(unordered)) + 1
        raise ValueError(f"live row {row} is out of order: live rows go by document, then by position")


def _check_spans(spans: NDArray[np.int64], document: NDArray[np.int64]) -> None:
    if (spans < 1).any():
        index = int(np.argmax(spans < 1))
        raise ValueError(f"span {index} of live_spans has {spans[index]} rows: each has at least one")
    if spans.sum() != document.size:
        raise ValueError(f"live_spans hold {spans.sum()} rows, the batch has {document.size} live ones")
    ends = np.cumsum(spans)
    crossing = document[ends - 1] != document[ends - spans]
    if crossing.any():
        index = int(np.argmax(crossing))
        first, last = document[ends[index] - spans[index]], document[ends[index] - 1]
        raise ValueError(f"span {index} of live_spans reaches from document {first} into document {last}")


def _cumulative(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _places(rows: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    """Of 0 … size-1, the place of each in `rows`; -1 where it is not there."""
    places = np.full(size, -1, np.int32)
    places[rows] = np.arange(rows.size)
    return places


def _flipped_ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`start+length-1 … start` of every range, one after the other."""
    ends = np.cumsum(lengths)
    last_rows = np.repeat(starts + lengths - 1, lengths)
    return last_rows - (np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - lengths, lengths))
