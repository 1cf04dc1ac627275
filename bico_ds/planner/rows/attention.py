"""The backward pass of attention (bico_ds/attention), replayed for its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bico_ds.planner.compute.attention import SPAN_FLASH_FROM
from bico_ds.planner.ranges import Range
from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.case import FP32, Case
from bico_ds.planner.workload import MicroBatch

# `tile_scores` and `tile_min_rows` of CUDA_POLICY in bico_ds/attention/layout.py.
TILE_SCORES = 1 << 20
TILE_ROWS = 64
# `_KEPT_SCORES` of bico_ds/attention/tiles.py: of tiles whose masks are kept for all layers.
MASKED_SCORES = 1 << 22

INDEX = 8  # bytes, int64

# The rows by which flash kernels pad each document's sums of gradients.
_FLASH_PADDING = 128

GRADIENTS = ("gradient of queries", "gradient of keys", "gradient of values")
OWN = ("queries", "keys", "values", "output of attention", "log-sum-exp", "gradient of attention's output")


def attention_backward(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """From the gradient of attention's output to `GRADIENTS`, of the un-rotated queries, keys and values.

    `tile`: the largest, in a layout that has tiles. What live rows see of their spans is computed last. By Triton or tiles
    it is left out: no measured peak was there (`tests/planner/test_activations.py`).
    """
    if case.attention == "triton":
        _triton(alive, case, batch, queries=batch.rows)
    elif case.attention == "flash":
        _flash(alive, case, batch, tile)
        if batch.mean_span >= SPAN_FLASH_FROM:
            _flash_spans(alive, case, batch)
    else:
        _accumulators(alive, case)
        if case.attention == "tiles":
            _tile(alive, case, batch, tile)
    alive.free("sums of key gradients")
    alive.free(*OWN)


def flipped_rows(batch: MicroBatch) -> float:
    """Rows of the anti-causal pass: all kept ones but the last of each document (`build_plan` of attention/plan.py)."""
    return 0.0 if batch.mode == "causal" else batch.kept_rows - batch.documents


def tiled_scores(case: Case, batch: MicroBatch) -> Range:
    """Scores per head in all dense tiles: of every row without a flash kernel, with one of live rows.

    At least the pairs of a query and a key; at most those of a single block, in which every document is as long as the
    longest (`build_tiles` of attention/tiles.py), and has as many live rows as chance may give it: two standard deviations
    of a Poisson distribution above the mean.
    """
    if case.attention != "tiles" and not case.tiles_live:
        return Range.exactly(0)
    rows = _tiled_rows(case, batch)
    queries = batch.longest * rows / batch.kept_rows
    if case.attention == "flash":
        queries += 2 * math.sqrt(queries)
    padded = batch.documents * batch.longest * queries
    pairs = batch.pairs * rows / batch.rows
    return Range(min(pairs, padded), padded)


def tile_indices(case: Case, batch: MicroBatch) -> Range:
    """Bytes of the int64 indices of all dense tiles (`Tile` of attention/tiles.py): two per key, three per query.

    The keys are those of all documents, without padding and with all of it; where there are fewer queries than documents,
    perhaps hardly any.
    """
    queries = _tiled_rows(case, batch)
    keys = Range(batch.kept_rows if queries >= batch.documents else 0.0, batch.documents * batch.longest)
    return keys.times(2 * INDEX) + Range.exactly(3 * INDEX * queries)


@dataclass(frozen=True, kw_only=True)
class LargestTile:
    """The dense tile with the most scores: how many per head, and its rows of keys, with padding."""

    scores: float
    keys: float


def largest_tiles(case: Case, batch: MicroBatch) -> tuple[LargestTile, LargestTile]:
    """Without padding and with all of it; within the bounds of the layout's policy."""
    bound = max(TILE_SCORES, TILE_ROWS * batch.longest)
    scores = tiled_scores(case, batch)
    if not scores.high:
        return (LargestTile(scores=0, keys=0),) * 2
    queries = _tiled_rows(case, batch) / batch.documents
    most_keys = min(batch.documents * batch.longest, max(batch.longest, bound / queries))
    return (
        LargestTile(scores=min(scores.low, bound), keys=min(batch.kept_rows, most_keys)),
        LargestTile(scores=min(scores.high, bound), keys=most_keys),
    )


def _tiled_rows(case: Case, batch: MicroBatch) -> float:
    return batch.rows if case.attention == "tiles" else batch.live_rows


def _results(case: Case) -> dict[str, float]:
    """The gradients as they go to the linear layers, by bytes per row."""
    widths = (case.query_width, case.key_width, case.key_width)
    return {name: case.size * width for name, width in zip(GRADIENTS, widths, strict=True)}


def _accumulators(alive: Alive, case: Case) -> None:
    """`Backend.backward` of attention/backend.py: sums of keys' and values' gradients in fp32, at last in the own dtype."""
    queries, keys, values = GRADIENTS
    results = _results(case)
    alive.make({queries: results[queries], "sums of key gradients": 2 * FP32 * case.key_width})
    if case.size < FP32:
        alive.make({keys: results[keys], values: results[values]})


def _triton(alive: Alive, case: Case, batch: MicroBatch, *, queries: float) -> None:
    """`backward_launches` of attention/triton/launches.py, for a table of so many rows: rotated ones, lse and its like."""
    directions = 1 if batch.mode == "causal" else 2
    alive.make(_results(case))
    alive.make({"rotated keys": directions * case.size * case.key_width}, rows=batch.kept_rows)
    per_query = directions * case.size * case.query_width + 2 * FP32 * case.shapes.heads
    alive.make({"rotated queries": per_query}, rows=queries)
    alive.free("rotated keys", "rotated queries")


def _flash(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """`two_pass_backward` of attention/two_pass.py, and with live rows `Backend.backward` around it, with what serves them.

    The inputs of both passes are made at once, and each pass's gradients stay until all are summed.
    """
    if batch.live_rows:
        _beside_live(alive, case, batch)
    queries, keys, b = case.query_width, case.key_width, case.size
    kept, flipped = batch.kept_rows, flipped_rows(batch)
    alive.make({"inputs of the first pass": b * (queries + keys)}, rows=kept)
    inputs, results = b * (queries + 2 * keys), 2 * b * queries + FP32 * case.shapes.heads
    alive.make({"inputs of the second pass": inputs + results}, rows=flipped)
    for name, rows in (("first", kept), ("second", flipped)):
        alive.make({f"gradients of the {name} pass": b * (queries + 2 * keys)}, rows=rows)
        alive.make({"flash kernel's sums": flash_sums(case, rows, batch.documents) if rows else 0}, rows=1)
        alive.free("flash kernel's sums")
    alive.make(_results(case) if not batch.live_rows or not case.tiles_live else {})
    alive.free(
        *(f"{what} of the {name} pass" for what in ("inputs", "gradients") for name in ("first", "second"))
    )
    if batch.live_rows and case.tiles_live:
        _tile(alive, case, batch, tile)
        alive.make(_results(case))


def _flash_spans(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """`Backend._add_spans` of attention/backend.py, within the flash kernel: rows of spans, as they are and rotated."""
    queries, keys, b = case.query_width, case.key_width, case.size
    known = 2 * b * queries + 2 * FP32 * case.shapes.heads
    rows = b * (queries + 2 * keys + 2 * case.shapes.head_dim) + known
    passing = b * (queries + keys) + b * (queries + 2 * keys)
    alive.make({"rows of spans": rows, "inputs and gradients of spans": passing}, rows=batch.live_rows)
    spans = batch.live_rows / batch.mean_span
    alive.make({"flash kernel's sums": flash_sums(case, batch.live_rows, spans)}, rows=1)
    alive.free("rows of spans", "inputs and gradients of spans", "flash kernel's sums")


def _beside_live(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """Gradients that several kernels add to, and what the Triton kernels need; in fp32 where tiles add to them."""
    if case.tiles_live:
        sums = {"sums of key gradients": 2 * FP32 * case.key_width}
        alive.make({GRADIENTS[0]: case.size * case.query_width, **sums})
    else:
        _triton(alive, case, batch, queries=batch.live_rows)


def flash_sums(case: Case, rows: float, documents: float) -> float:
    """Bytes within FlashAttention-2's backward kernel: `mha_varlen_bwd` of its flash_api.cpp, and of torch's copy.

    The query gradients in fp32, in rows padded per document and heads padded to 32 columns (64 above 128), a sum per row
    and head, and with grouped queries the gradients of keys and values by query head.
    """
    shapes = case.shapes
    columns = 32 if shapes.head_dim <= 128 else 64
    padded = -(-shapes.head_dim // columns) * columns
    sums = FP32 * shapes.heads * (padded + 1) * (rows + _FLASH_PADDING * documents)
    grouped = 2 * case.size * case.query_width * rows if shapes.heads != shapes.key_heads else 0
    return sums + grouped


def tile_forward(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """`dense_forward` of attention/dense.py: where its keys are rotated both ways, and where its scores go to fp32.

    First the rows as they are and tables of cos and sin are there too, and a sum more than the keys' two rotations; then the
    scores of the last rotation, and their sum in both dtypes.
    """
    b, scores, keys = case.size, tile.scores * case.shapes.heads, tile.keys * case.key_width
    queries, table = case.query_width * _tiled_rows(case, batch), tile.keys * case.shapes.head_dim
    alive.make({"rows of a tile": b * (4 * keys + 2 * table + 3 * queries)}, rows=1)
    rotated = 2 * b * (keys + queries)
    alive.make({"scores of a tile": (2 * b + FP32) * scores, "rows of a tile": rotated}, rows=1)
    alive.free("scores of a tile", "rows of a tile")


def _tile(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """`dense_backward` of attention/dense.py, where the scores' gradient is made, and where the keys' is added to the sums.

    First weights, their gradient and the scores' are in fp32 and the latter in the own dtype; then two are in fp32 and two
    in the own dtype. Keys are there rotated both ways, with values; then their gradients too, and one in fp32.
    """
    b, scores, keys = case.size, tile.scores * case.shapes.heads, tile.keys * case.key_width
    queries = 4 * b * case.query_width * _tiled_rows(case, batch)
    alive.make(
        {"scores of a tile": (3 * FP32 + b) * scores, "rows of a tile": 4 * b * keys + queries}, rows=1
    )
    alive.make({"scores of a tile": 2 * (FP32 + b) * scores, "rows of a tile": (7 * b + FP32) * keys}, rows=1)
    alive.free("scores of a tile", "rows of a tile")
