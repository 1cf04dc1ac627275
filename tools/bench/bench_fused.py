#!/usr/bin/env python
"""A fused attention kernel beside the two passes, in several tilings: bf16, Llama-3-8B's heads, with and without live rows.

    PYTHONPATH=FOLDER python tools/bench/bench_fused.py [--json]

FOLDER holds spike_fused.py, the kernel that is tried: `Config`, `fused_plan(plan, rows_per_block=, keys_per_block=)` and
`FusedBidirectional`. It is no part of this project yet. Exit code 2 where it is not there or there is no CUDA device.
"""

from __future__ import annotations

import importlib
import json
from argparse import ArgumentParser, Namespace
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from gpu_attention import HEAD_DIM, milliseconds, plan_with_live, random_inputs, run

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import KERNELS
from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.plan import AttentionPlan, build_plan
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError

TWO_PASSES = Backend(kernel=KERNELS["aten-cuda"], policy=CUDA_POLICY)
SHAPES = ((40, 8192), (512, 8192), (4096, 8192), (32768, 32768))  # tokens per document, and in all
# (rows, keys, warps, stages) of the forward kernel, of the queries' gradient and of the keys' gradient
TILINGS = (
    ((64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 1)),
    ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 1)),
    ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
    ((64, 64, 4, 2), (64, 64, 8, 3), (32, 64, 8, 2)),
)


def make_plan(length: int, rows: int, live_share: float) -> AttentionPlan:
    """Documents of `length` tokens, a share of which are live placeholders."""
    kept = [int(length * (1 - live_share))] * (rows // length)
    if live_share and int(kept[0] * live_share / (1 - live_share)):
        return plan_with_live(kept, live_share)
    return build_plan("bidirectional", kept_lengths=kept)


def try_tiling(
    fused: Any, plan: AttentionPlan, tensors: list[torch.Tensor], tiling: tuple, base: list
) -> float:
    """Milliseconds of forward and backward; prints them, with the difference from the two passes' results."""
    forward_tile, query_tile, key_tile = tiling
    q, k, v, cos, sin, grad = tensors
    config = fused.Config(forward=forward_tile, query=(forward_tile[0], *query_tile[1:]), key=key_tile)
    tables = fused.fused_plan(plan, rows_per_block=forward_tile[0], keys_per_block=key_tile[1]).to("cuda")

    def forward() -> torch.Tensor:
        return fused.FusedBidirectional.apply(q, k, v, cos, sin, tables, HEAD_DIM**-0.5, config)

    def both() -> list[torch.Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    pairs = zip(both(), base, strict=True)
    error = max(float((x.double() - y.double()).abs().max() / y.double().abs().max()) for x, y in pairs)
    with torch.no_grad():
        alone = milliseconds(forward)
    together = milliseconds(both)
    print(
        f"    {tiling}: forward {alone:.3f}, both {together:.3f} ms, differs from two passes by {error:.1e}",
        flush=True,
    )
    return together


def measure(fused: Any, length: int, rows: int, live_share: float) -> dict[str, Any]:
    """The best tiling beside the two passes."""
    plan = make_plan(length, rows, live_share)
    tensors, on_device = random_inputs(plan.num_rows), plan.to("cuda")
    layout = build_layout(plan, CUDA_POLICY).to("cuda").with_masks(torch.bfloat16)
    base = run(TWO_PASSES, tensors, on_device, layout)
    two = milliseconds(lambda: run(TWO_PASSES, tensors, on_device, layout))
    name = f"{length} tokens per document, {plan.num_rows} rows, {plan.num_live} live"
    print(f"{name}: two passes {two:.3f} ms", flush=True)
    times = []
    for tiling in TILINGS:
        try:
            times.append(try_tiling(fused, plan, tensors, tiling, base))
        except Exception as error:  # one tiling that does not fit the GPU must not cost the others' figures
            print(f"    {tiling}: {type(error).__name__} {str(error)[:150]}", flush=True)
    best = min(times, default=None)  # every tiling failed
    return {"name": name, "ours": two, "other": best, "unit": "ms", "ratio": two / best if best else None}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run_fused(options: Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: nothing to measure")
    try:
        fused = importlib.import_module("spike_fused")
    except ModuleNotFoundError as error:
        raise UserError(f"no module '{error.name}': name spike_fused.py's folder in PYTHONPATH") from None
    rows = [measure(fused, length, total, share) for length, total in SHAPES for share in (0.0, 0.03)]
    if options.json:
        print(json.dumps({"rows": rows}))


main = Command(description=__doc__, add_options=add_options, run=run_fused)


if __name__ == "__main__":
    main.start()
