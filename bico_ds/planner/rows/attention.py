"""The backward pass of attention (bico_ds/attention), replayed for its memory."""

from __future__ import annotations

from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.case import FP32, Case
from bico_ds.planner.workload import MicroBatch

# `tile_scores` and `tile_min_rows` of CUDA_POLICY in bico_ds/attention/layout.py.
TILE_SCORES = 1 << 20
TILE_ROWS = 64

# The rows by which flash kernels pad each document's sums of gradients.
_FLASH_PADDING = 128

GRADIENTS = ("gradient of queries", "gradient of keys", "gradient of values")
OWN = ("queries", "keys", "values", "output of attention", "log-sum-exp", "gradient of attention's output")


def attention_backward(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """From the gradient of attention's output to `GRADIENTS`, of the un-rotated queries, keys and values."""
    if case.attention == "triton":
        _triton(alive, case, batch)
    elif case.attention == "flash":
        _flash(alive, case, batch)
    else:
        _accumulators(alive, case)
        if case.attention == "tiles":
            _tiles(alive, case, batch)
    alive.free("sums of key gradients", "first pass's gradients")
    alive.free(*OWN)


def flipped_rows(batch: MicroBatch) -> float:
    """Rows of the anti-causal pass: all kept ones but the last of each document (`build_plan` of attention/plan.py)."""
    return 0.0 if batch.mode == "causal" else batch.kept_rows - batch.documents


def tiled_pairs(case: Case, batch: MicroBatch) -> float:
    """Pairs of a query and a key, per head, that dense tiles score: all without a flash kernel, else those of live rows.

    Of documents alike, in which every row sees as many keys.
    """
    return batch.pairs if case.attention == "tiles" else batch.pairs * batch.live_rows / batch.rows


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


def _triton(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """`backward_launches` of attention/triton/launches.py, for a table of all rows: rotated rows, lse and its like."""
    directions = 1 if batch.mode == "causal" else 2
    alive.make(_results(case))
    alive.make({"rotated keys": directions * case.size * case.key_width}, rows=batch.kept_rows)
    alive.make({"rotated queries": directions * case.size * case.query_width + 2 * FP32 * case.shapes.heads})
    alive.free("rotated keys", "rotated queries")


def _flash(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """`two_pass_backward` of attention/two_pass.py, and with live rows `Backend.backward` around it, with their tiles."""
    if batch.live_rows:
        alive.make(
            {
                GRADIENTS[0]: case.size * case.query_width,
                "sums of key gradients": 2 * FP32 * case.key_width,
            }
        )
    in_fp32 = FP32 * (case.query_width + 2 * case.key_width)
    _pass(alive, case, batch.kept_rows, batch.documents, gathered=0)
    alive.make({"first pass's gradients": in_fp32}, rows=batch.kept_rows)
    if flipped := flipped_rows(batch):
        b = case.size
        tables = 4 * b * case.shapes.head_dim
        gathered = b * (2 * case.query_width + case.key_width) + FP32 * case.shapes.heads + tables
        _pass(alive, case, flipped, batch.documents, gathered=gathered)
    if batch.live_rows:
        alive.free("first pass's gradients")
        _tiles(alive, case, batch)
    alive.make(_results(case))


def _pass(alive: Alive, case: Case, rows: float, documents: float, *, gathered: float) -> None:
    """`_pass_backward`: rotated inputs, the kernel, gradients in fp32, and those of the un-rotated inputs.

    `gathered`: bytes per row of what the second pass has beside rotated queries and keys: values, out, lse, the gradient of
    out, and tables.
    """
    queries, keys, b = case.query_width, case.key_width, case.size
    names = ("inputs of a pass", "gradients of a pass", "gradients in fp32", "gradients rotated back")
    alive.make({names[0]: b * (queries + keys) + gathered}, rows=rows)
    alive.make({names[1]: b * (queries + 2 * keys)}, rows=rows)
    alive.make({"flash kernel's sums": flash_sums(case, rows, documents)}, rows=1)
    alive.free("flash kernel's sums")
    alive.make({names[2]: FP32 * (queries + 2 * keys)}, rows=rows)
    alive.make({names[3]: FP32 * (queries + keys)}, rows=rows)
    alive.free(*names)


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


def _tiles(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """`dense_backward` of attention/dense.py: in the largest tile, weights, their gradient and the scores' in fp32 at once.

    The scores' gradient has a copy in the dtype of the values.
    """
    scores = min(tiled_pairs(case, batch), max(TILE_SCORES, TILE_ROWS * batch.longest))
    alive.make({"scores of a tile": (3 * FP32 + case.size) * case.shapes.heads}, rows=scores)
    alive.free("scores of a tile")
