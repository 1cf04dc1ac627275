"""What one document gives to a batch of masked tokens, straight from the definitions: one token at a time, lists only.

`spans` are the positions of rows that see each other causally; None where no row sees a masked token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tests.objectives.bico_reference import bico_document, read_back


def runs(masked: list[bool]) -> list[tuple[int, int]]:
    """The maximal runs [p, q) of masked tokens."""
    found, start = [], None
    for position, hidden in enumerate([*masked, False]):
        if hidden and start is None:
            start = position
        if not hidden and start is not None:
            found.append((start, position))
            start = None
    return found


def in_place_document(tokens: list[int], masked: list[bool], placeholder: int) -> dict[str, Any]:
    """Every masked token has a row, which predicts that token."""
    kept = [i for i, hidden in enumerate(masked) if not hidden]
    hidden_at = [i for i, hidden in enumerate(masked) if hidden]
    return {
        "kept": [(tokens[i], i) for i in kept],
        "live": [(placeholder, i, sum(k <= i for k in kept)) for i in hidden_at],
        "predictions": {i: tokens[i] for i in hidden_at},
        "spans": None,
    }


def next_document(tokens: list[int], masked: list[bool], placeholder: int) -> dict[str, Any]:
    return bico_document(tokens, masked, placeholder) | {"spans": None}


def infilling_document(tokens: list[int], masked: list[bool], *, left_to_right: bool) -> dict[str, Any]:
    """Part A: the kept tokens. Part B: of each span [p, q) the rows p … q - 2, or to q - 1, with their true ids."""
    kept = [i for i, hidden in enumerate(masked) if not hidden]
    predictions, spans = {}, []
    for p, q in runs(masked):
        spans.append(list(range(p, q if left_to_right else q - 1)))
        predictions[p - 1] = tokens[p]
        predictions |= {t: tokens[t + 1] for t in range(p, q - 1)}
    rows = [t for span in spans for t in span]
    together = [rows] if left_to_right else spans
    return {
        "kept": [(tokens[i], i) for i in kept],
        "live": [(tokens[t], t, sum(k <= t for k in kept)) for t in rows],
        "predictions": predictions,
        "spans": [span for span in together if span],
    }


def read_masked(batch: Any) -> list[dict[str, Any]]:
    """The same description, read from a PackedBatch."""
    documents = read_back(batch)
    plan = batch.plan
    if plan.span_cu_seqlens is None:
        return [document | {"spans": None} for document in documents]
    found: list[list[list[int]]] = [[] for _ in documents]
    bounds = plan.span_cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, plan.num_live)
    for start, end in pairwise(bounds):
        (owner,) = set(plan.live_document[start:end].tolist())
        found[owner].append(batch.position_ids[plan.num_kept + start : plan.num_kept + end].tolist())
    return [document | {"spans": spans} for document, spans in zip(documents, found, strict=True)]
