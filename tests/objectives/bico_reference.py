"""BICO's batch, straight from the paper's words: one document, one token at a time, lists only."""

from __future__ import annotations


def bico_document(tokens: list[int], masked: list[bool], placeholder: int) -> dict:
    """What one document must contribute, from its tokens and which of them are masked."""
    kept = [i for i in range(len(tokens)) if not masked[i]]
    live = [i for i in range(len(tokens) - 1) if masked[i] and masked[i + 1]]
    predictions = {}  # position of the row -> the masked token at the next position
    for i in range(len(tokens) - 1):
        if masked[i + 1]:
            assert i in kept or i in live
            predictions[i] = tokens[i + 1]
    return {
        "kept": [(tokens[i], i) for i in kept],
        "live": [(placeholder, i, sum(1 for k in kept if k <= i)) for i in live],
        "predictions": predictions,
    }


def read_back(batch) -> list[dict]:
    """The same description, read from a PackedBatch row by row."""
    plan, cu = batch.plan, batch.plan.cu_seqlens.tolist()
    rows = list(zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True))
    documents = []
    row_owner: dict[int, tuple[int, int]] = {}
    for d in range(len(cu) - 1):
        documents.append({"kept": rows[cu[d] : cu[d + 1]], "live": [], "predictions": {}})
        row_owner |= {row: (d, rows[row][1]) for row in range(cu[d], cu[d + 1])}
    for n, (d, split) in enumerate(zip(plan.live_document.tolist(), plan.live_split.tolist(), strict=True)):
        row = plan.num_kept + n
        documents[d]["live"].append((*rows[row], split))
        row_owner[row] = (d, rows[row][1])
    assert len(row_owner) == len(rows)
    for row, target in zip(batch.loss_rows.tolist(), batch.targets.tolist(), strict=True):
        d, position = row_owner[row]
        assert position not in documents[d]["predictions"]
        documents[d]["predictions"][position] = target
    return documents
