#!/usr/bin/env python
"""Every CUDA attention backend of this machine: right, and how fast, in one call.

    python tools/bench/gpu_attention.py [--json]

First each backend against the dense fp64 oracle (out and gradients, with live rows in tiles and as hidden
keys). Then, at 4k, 8k and 32k tokens, TFLOP/s of two-pass bidirectional attention beside plain causal flash (the
kernel alone, its inputs rotated), and of its parts: each pass forward, and the merge. Then the cost of live rows by
their share, on both paths: the two constants of `CUDA_POLICY`. Exit code 1 if a backend fails or disagrees with the
oracle, or if there is no CUDA device.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import KERNELS
from bico_ds.attention.inputs import AttentionResults
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import CUDA_POLICY, Layout, build_layout
from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.packed import run_packed_attention
from bico_ds.attention.plan import AttentionPlan, build_plan
from bico_ds.attention.two_pass import merge
from bico_ds.common.command_line import Command

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
TOLERANCE = 3e-2  # largest error relative to the largest entry; dense bf16 reaches about 1e-2
IN_TILES = replace(CUDA_POLICY, hidden_cost=float("inf"))
AS_HIDDEN_KEYS = replace(CUDA_POLICY, hidden_cost=0.0)


def random_inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v (which require gradients), cos, sin, and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda n: torch.randn(rows, n, HEAD_DIM, generator=generator, device="cuda", dtype=dtype)  # noqa: E731
    frequency = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    angle = torch.arange(rows, device="cuda")[:, None] * torch.cat([frequency, frequency])
    q, k, v = (random(n).requires_grad_() for n in (HEADS, KEY_HEADS, KEY_HEADS))
    return [q, k, v, angle.cos().to(dtype), angle.sin().to(dtype), random(HEADS)]


def plan_with_live(kept: list[int], share: float) -> AttentionPlan:
    """Documents with live rows, a given share of all rows, spread evenly over their kept tokens."""
    counts = [int(length * share / (1 - share)) for length in kept]
    document = torch.repeat_interleave(torch.tensor(counts))
    pairs = zip(kept, counts, strict=True)
    splits = [torch.linspace(1, length, count).round().long() for length, count in pairs]
    return build_plan(
        "bidirectional", kept_lengths=kept, live_document=document, live_split=torch.cat(splits)
    )


def run(
    backend: Backend, tensors: list[Tensor], plan: AttentionPlan, layout: Layout | None = None
) -> list[Tensor]:
    """out and the gradients of q, k, v. Without a `layout` the call makes one."""
    q, k, v, cos, sin, grad_out = tensors
    out = run_packed_attention(q, k, v, cos, sin, plan, scale=HEAD_DIM**-0.5, backend=backend, layout=layout)
    return [out.detach(), *torch.autograd.grad(out, tensors[:3], grad_out)]


def largest_error(backend: Backend, plan: AttentionPlan) -> float:
    tensors = random_inputs(plan.num_rows)
    q, k, v, cos, sin, grad_out = tensors
    out = oracle_attention(q, k, v, cos, sin, plan, HEAD_DIM**-0.5)
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    pairs = zip(run(backend, tensors, plan), expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Of one call, the median of several after three."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def op_milliseconds(backend: Backend, plan: AttentionPlan) -> float:
    """Of the op, forward and backward, with its layout made beforehand, as by a worker of the loader."""
    tensors = random_inputs(plan.num_rows)
    layout = build_layout(plan, backend.policy).to("cuda").with_masks(tensors[0].dtype)
    return milliseconds(lambda: run(backend, tensors, plan, layout))


def check(kernel: CausalKernel) -> list[tuple[str, float]]:
    """Largest error of each path of a backend."""
    documents = [300, 1, 77, 513]
    cases = {
        "causal": (build_plan("causal", kept_lengths=documents), CUDA_POLICY),
        "bidirectional": (build_plan("bidirectional", kept_lengths=documents), CUDA_POLICY),
        "live rows in tiles": (plan_with_live(documents, 0.3), IN_TILES),
    }
    if kernel.refusal(torch.bfloat16, HEAD_DIM + 8, torch.device("cuda")) is None:
        cases["live rows as hidden keys"] = (plan_with_live(documents, 0.3), AS_HIDDEN_KEYS)
    return [
        (name, largest_error(Backend(kernel=kernel, policy=policy), plan.to("cuda")))
        for name, (plan, policy) in cases.items()
    ]


def plain_flash(kernel: CausalKernel, tensors: list[Tensor], plan: AttentionPlan) -> tuple[float, float]:
    """Milliseconds of the kernel alone, causal: forward, and forward with backward."""
    q, k, v, _, _, grad_out = (x.detach() for x in tensors)
    settings: dict[str, Any] = {"cu_seqlens": plan.cu_seqlens, "max_seqlen": plan.max_seqlen}
    settings["scale"] = HEAD_DIM**-0.5

    def both() -> None:
        out, lse = kernel.forward(q, k, v, **settings)
        kernel.backward(grad_out, q, k, v, out, lse, **settings)

    return milliseconds(lambda: kernel.forward(q, k, v, **settings)), milliseconds(both)


def merge_milliseconds(plan: AttentionPlan) -> float:
    """Of the merge of two passes' results."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    rows, flipped = plan.num_rows, plan.flip_rows.numel()
    out, out2 = (random(n, HEADS, HEAD_DIM).bfloat16() for n in (rows, flipped))
    base = AttentionResults(out=out, lse=random(HEADS, rows).t())
    other = AttentionResults(out=out2, lse=random(HEADS, flipped).t())
    return milliseconds(lambda: merge(base, other, plan.flip_rows))


def speed(kernel: CausalKernel) -> list[dict]:
    """Bidirectional beside plain causal flash on one document, and the parts of its forward pass.

    With the rate of each; a backward pass has 2.5 times the products of a forward pass.
    """
    rows = []
    backend = Backend(kernel=kernel, policy=CUDA_POLICY)
    for length in (4096, 8192, 32768):
        plan = build_plan("bidirectional", kept_lengths=[length])
        flash_forward, flash = plain_flash(kernel, random_inputs(length), plan.to("cuda"))
        both = op_milliseconds(backend, plan)
        merging = merge_milliseconds(plan.to("cuda"))
        forward = 4 * HEADS * HEAD_DIM * length**2 / 2 / 1e9  # TFLOP times 1000: over ms, TFLOP/s
        rates = f"{3.5 * forward / flash:.0f} and {7 * forward / both:.0f} TFLOP/s"
        rows.append(
            row(f"{kernel.name}: plain causal ÷ bidirectional, {length} tokens ({rates})", both, flash)
        )
        rate = f"{forward / flash_forward:.0f} TFLOP/s"
        rows.append(
            row(
                f"{kernel.name}: a pass ÷ the merge, forward, {length} tokens ({rate})",
                merging,
                flash_forward,
            )
        )
    return rows


def live_cost(kernel: CausalKernel) -> list[dict]:
    """Tiles beside hidden keys, by the share of live rows."""
    rows = []
    for share in (0.02, 0.16, 0.33, 0.5):
        plan = plan_with_live([int(8192 * (1 - share))], share)
        tiles, hidden = (
            op_milliseconds(Backend(kernel=kernel, policy=policy), plan)
            for policy in (IN_TILES, AS_HIDDEN_KEYS)
        )
        rows.append(row(f"{kernel.name}: tiles ÷ hidden keys, {share:.0%} live of 8192 rows", hidden, tiles))
    return rows


def row(name: str, mine: float, other: float) -> dict:
    return {
        "name": name,
        "ours": round(mine, 3),
        "other": round(other, 3),
        "unit": "ms",
        "ratio": round(other / mine, 3),
    }


def report_errors(console: Console, kernel: CausalKernel) -> int:
    """Print the error of each path; how many are wrong."""
    errors = check(kernel)
    for name, error in errors:
        console.print(f"{kernel.name}, {name}: error {error:.1e} {'WRONG' if error > TOLERANCE else 'ok'}")
    return sum(error > TOLERANCE for _, error in errors)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def check_and_measure(options: Namespace) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check", file=sys.stderr)
        return 1
    console, device, rows, wrong = Console(width=130), torch.device("cuda"), [], 0
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, "
        f"{HEADS} query and {KEY_HEADS} key heads of {HEAD_DIM}"
    )
    for kernel in KERNELS.values():
        refusal = kernel.refusal(torch.bfloat16, HEAD_DIM, device)
        if refusal is not None:
            console.print(f"{kernel.name}: {refusal}")
            continue
        try:
            wrong += report_errors(console, kernel)
            rows += speed(kernel)
            if kernel.refusal(torch.bfloat16, HEAD_DIM + 8, device) is None:
                rows += live_cost(kernel)
        except Exception as error:  # one backend's failure must not cost the others' figures
            wrong += 1
            console.print(f"{kernel.name}: FAILED: {type(error).__name__}: {error}")
    table = Table("what", "ours, ms", "other, ms", "other ÷ ours")
    for line in rows:
        table.add_row(line["name"], f"{line['ours']:.2f}", f"{line['other']:.2f}", f"{line['ratio']:.2f}")
    console.print(table)
    if options.json:
        print(json.dumps({"rows": rows}))
    return 1 if wrong else 0


main = Command(description=__doc__, add_options=add_options, run=check_and_measure)


if __name__ == "__main__":
    main.start()
