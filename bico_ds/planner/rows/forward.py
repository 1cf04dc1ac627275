"""A decoder layer's forward pass: what its functions hold meanwhile, though nothing keeps it for later."""

from __future__ import annotations

from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.attention import LargestTile, flipped_rows, tile_forward
from bico_ds.planner.rows.case import FP32, Case
from bico_ds.planner.workload import MicroBatch

_ADAPTED = ("output of up_proj's adapter", "scaled output of up_proj's adapter")


def passing_forward(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """Of a layer that keeps nothing but its input: where it holds most, at attention's tiles or passes or the MLP's gates.

    `tile`: the largest, in a layout that has tiles. Around both are the first norm's output and queries, keys and values;
    the values of the first pass are these. At the gates, all from `o_proj` on: an adapter of `up_proj` scales its output,
    beside what the layer gives without it.
    """
    row, wide = case.size * case.shapes.hidden, case.size * case.shapes.intermediate
    if case.attention in ("flash", "tiles"):
        queries, keys = case.size * case.query_width, case.size * case.key_width
        results = queries + FP32 * case.shapes.heads
        alive.make({"output of the first norm": row, "queries, keys and values": queries + 2 * keys})
        alive.make({"results of live rows, too": results if batch.live_rows or tile.scores else 0})
        if tile.scores:
            tile_forward(alive, case, batch, tile)
    if case.attention == "flash":
        alive.make({"first pass": queries + keys + results}, rows=batch.kept_rows)
        alive.make({"second pass": queries + 2 * keys + results}, rows=flipped_rows(batch))
    alive.free(*alive.tensors)
    alive.make({"output of o_proj": row, "input of the second norm": row, "output of the second norm": row})
    names = ["gate", "up", "gated product"]
    if case.is_adapted("up_proj"):
        names = ["gate", "output of up_proj", *_ADAPTED]
    alive.make(dict.fromkeys(names, wide))


def layer_forward(alive: Alive, case: Case, *, recomputed: bool) -> None:
    """At the end of a layer's forward pass.

    What is held is attention's part of the sum; with adapters the inputs of the gated MLP and of `down_proj`, what this
    gives without its adapter, and the adapter's output before and after it is scaled. Recomputation stops before those two,
    or under ZeRO-3 between them (`early_stop` of torch.utils.checkpoint), and begins when an adapter of `down_proj` has
    scaled its gradient.
    """
    row, wide = case.size * case.shapes.hidden, case.size * case.shapes.intermediate
    held = {"output of o_proj": row, "output of the second norm": row, "gated product": wide}
    if case.is_adapted("down_proj"):
        held["output of down_proj"] = row
        held["scaled gradient" if recomputed else "scaled output of down_proj's adapter"] = row
        if case.zero3 or not recomputed:
            held["output of down_proj's adapter"] = row
    passing = {name: size for name, size in held.items() if name not in alive.tensors}
    alive.make(passing)
    alive.free(*passing)
