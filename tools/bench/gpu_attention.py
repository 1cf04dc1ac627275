#!/usr/bin/env python
"""Every attention backend of this machine's GPU: is it right, and how fast?

    python tools/bench/gpu_attention.py [--part check|speed] [--seconds 50] [--rehearse] [--json]

check: each backend beside the dense fp64 oracle, out and gradients: causal, bidirectional, with live rows; several head
dimensions and dtypes. Exit code 1 if one is wrong or fails.

speed: milliseconds and TFLOP/s, forward and backward, in bf16 with Llama-3-8B's heads and 8192 rows, in documents of 40 to
32768 tokens, causal, bidirectional, and with live rows: of each flash kernel alone, of the op on it (two passes where
bidirectional), of the fused Triton kernels, and of the authors' dense form at 2048 tokens. TFLOP/s count the products
that the mask needs, for the backward pass 2.5 times those of the forward pass. Times are the device's own: the median of
ten, each with a cold L2 cache.

Each backend runs in a process of its own, so that a failing one costs no other's figures; what a part has not measured after
--seconds is left out. With --rehearse all of it runs on
the CPU, at a tiny size: its figures say nothing of any GPU.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from attention_cases import (
    HEAD_DIM,
    HEADS,
    IN_TILES,
    KEY_HEADS,
    LLAMA_8B,
    REHEARSAL,
    REPEATS,
    TILES,
    WARM_UP,
    Ended,
    Send,
    Shape,
    add_bench_options,
    add_end,
    any_kernel,
    beside_triton,
    can_hide_keys,
    checked_cases,
    compare,
    describe_comparison,
    documents,
    each_alone,
    errors,
    flash_backend,
    milliseconds,
    op_milliseconds,
    plan_with_live,
    prepare,
    random_inputs,
    refusal,
    run,
)
from torch import Tensor

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import AUTO_ORDER, KERNELS, TRITON
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.measured_policy import Comparison
from bico_ds.attention.plan import AttentionPlan, Mode
from bico_ds.common.command_line import Command
from bico_ds.common.traffic import counting_traffic
from bico_ds.proof.findings import Findings

# An older proof outside of this repository takes these from here.
__all__ = ["HEADS", "HEAD_DIM", "KEY_HEADS", "milliseconds", "plan_with_live", "random_inputs", "run"]

PARTS = ("check", "speed")
DENSE = "the authors' dense form"
PLAIN = " with torch's operations around it"
MODES: tuple[Mode, ...] = ("bidirectional", "causal")
COMPILING = (TRITON, "flash-attn-4")
CONVENTION = (
    f"speed: the device's own time by its events, the median of {REPEATS} after {WARM_UP}, each with a cold L2 cache; "
    "TFLOP/s count the products that the mask needs, backward 2.5 times forward"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`shapes` are checked, the first one timed. `dense_length`: of the documents of the authors' dense form."""

    shapes: tuple[Shape, ...]
    checked: tuple[int, ...]
    rows: int
    lengths: tuple[int, ...]
    dense_length: int


ON_GPU = Sizes(
    shapes=(
        LLAMA_8B,
        replace(LLAMA_8B, head_dim=64),
        replace(LLAMA_8B, dtype=torch.float16),
        replace(LLAMA_8B, head_dim=96),
        replace(LLAMA_8B, head_dim=256),
        replace(LLAMA_8B, dtype=torch.float32),
    ),
    checked=(300, 1, 77, 513),
    rows=8192,
    lengths=(40, 512, 4096, 32768),
    dense_length=2048,
)
ON_CPU = Sizes(
    shapes=(REHEARSAL, replace(REHEARSAL, dtype=torch.float16)),
    checked=(20, 1),
    rows=24,
    lengths=(8, 24),
    dense_length=12,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Documents of one length; a share of the tokens are live placeholders."""

    length: int
    mode: Mode
    live_share: float = 0.0

    def __str__(self) -> str:
        live = f", {self.live_share:.0%} live" if self.live_share else ""
        return f"{self.length} tokens, {self.mode}{live}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One way to compute a case, forward and backward. `teraflop`: 10^12 operations, the products that its mask needs.

    `launches`, `gigabytes`: what the Triton ops state of themselves.
    """

    case: Case
    way: str
    ms: float
    teraflop: float
    launches: int | None = None
    gigabytes: float | None = None

    @property
    def teraflop_per_second(self) -> float:
        return self.teraflop / self.ms * 1e3


def check(send: Send, name: str, sizes: Sizes) -> None:
    """Send a `Comparison` for each case of a backend."""
    for shape in sizes.shapes:
        if refusal(name, shape) is None:
            for case, plan, backend in checked_cases(name, shape, list(sizes.checked)):
                send(compare(name, case, backend, plan, shape))


def speed(send: Send, name: str, sizes: Sizes) -> None:
    """Send a `Timing` for each case of a backend."""
    shape = sizes.shapes[0]
    if name == DENSE:
        send(time_dense(Case(length=sizes.dense_length, mode="bidirectional"), shape, sizes.rows))
        return
    for case in timed_cases(sizes):
        plan = documents(case.mode, case.length, sizes.rows, case.live_share)
        if name == TRITON:
            send(time_fused(case, plan, shape))
            continue
        send(time_op(case, plan, shape, KERNELS[name]))
        if case.length == sizes.dense_length:
            send(time_plain_op(case, plan, shape, KERNELS[name]))
        if case.mode == "causal":
            send(time_kernel(case, plan, shape, KERNELS[name]))


def timed_cases(sizes: Sizes) -> Iterator[Case]:
    """The longest documents, which take most of the time, come last."""
    *shorter, longest = sizes.lengths
    for length in (*shorter, sizes.dense_length, longest):
        yield from (Case(length=length, mode=mode) for mode in MODES)
        if length != sizes.dense_length:
            yield from (Case(length=length, mode="bidirectional", live_share=share) for share in (0.03, 0.3))


def teraflop(plan: AttentionPlan, shape: Shape) -> float:
    """10^12 operations of the products that the plan's mask needs, forward and backward (1 to 2.5)."""
    kept = plan.cu_seqlens.diff().double()
    live = torch.bincount(plan.live_document, minlength=len(kept))
    pairs = kept * (kept + 1) / 2 if plan.mode == "causal" else kept * (kept + live)
    return 3.5 * 4 * float(pairs.sum()) * shape.heads * shape.head_dim / 1e12


def time_op(case: Case, plan: AttentionPlan, shape: Shape, kernel: CausalKernel) -> Timing:
    """Of `packed_attention` on a flash kernel, with live rows where they are as long as nothing was measured."""
    policy = CUDA_POLICY if can_hide_keys(kernel, shape) else IN_TILES
    estimated = flash_backend(kernel, shape, policy)
    backend = estimated if refusal(TRITON, shape) else beside_triton(kernel, shape, flash_from=1)
    ms = op_milliseconds(backend, plan, shape)
    return Timing(case=case, way=kernel.name, ms=ms, teraflop=teraflop(plan, shape))


def time_plain_op(case: Case, plan: AttentionPlan, shape: Shape, kernel: CausalKernel) -> Timing:
    """The same with torch's operations around the passes, as before there were kernels for it."""
    ms = op_milliseconds(Backend(kernel=kernel, policy=IN_TILES), plan, shape)
    return Timing(case=case, way=f"{kernel.name}{PLAIN}", ms=ms, teraflop=teraflop(plan, shape))


def time_kernel(case: Case, plan: AttentionPlan, shape: Shape, kernel: CausalKernel) -> Timing:
    """Of a flash kernel alone, causal, its inputs rotated."""
    q, k, v, _, _, grad_out = (x.detach() for x in random_inputs(plan.num_rows, shape))
    settings: dict[str, Any] = {"scale": shape.head_dim**-0.5, "max_seqlen": plan.max_seqlen}
    settings["cu_seqlens"] = plan.cu_seqlens.to(shape.device)

    def both() -> None:
        out, lse = kernel.forward(q, k, v, **settings)
        kernel.backward(grad_out, q, k, v, out, lse, **settings)

    ms = milliseconds(both, device=shape.device)
    return Timing(case=case, way=alone(kernel.name), ms=ms, teraflop=teraflop(plan, shape))


def alone(kernel_name: str) -> str:
    return f"{kernel_name} alone"


def time_fused(case: Case, plan: AttentionPlan, shape: Shape) -> Timing:
    """Of the Triton kernels, whose ops state on the meta device what they launch and move."""
    backend = beside_triton(any_kernel(shape), shape, flash_from=math.inf)
    layout = build_layout(plan, backend.policy).to("meta")
    with counting_traffic() as calls:
        tensors = [x.to("meta") for x in random_inputs(plan.num_rows, shape)]
        run(backend, [x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)], plan, layout)
    return Timing(
        case=case,
        way=TRITON,
        ms=op_milliseconds(backend, plan, shape),
        teraflop=teraflop(plan, shape),
        launches=sum(call.launches for call in calls),
        gigabytes=sum(call.bytes_read + call.bytes_written for call in calls) / 1e9,
    )


def time_dense(case: Case, shape: Shape, rows: int) -> Timing:
    """Of the authors' form, on the documents that the other ways have."""
    plan = documents(case.mode, case.length, rows)
    tensors = random_inputs(plan.num_rows, shape)

    def both() -> None:
        torch.autograd.grad(authors_dense(*tensors[:5], length=case.length), tensors[:3], tensors[5])

    ms = milliseconds(both, device=shape.device)
    return Timing(case=case, way=DENSE, ms=ms, teraflop=teraflop(plan, shape))


def authors_dense(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, length: int) -> Tensor:
    """BICO attention as its authors compute it: both rotations, two whole score matrices, a choice, one softmax.

    Of documents of `length` tokens, one per batch entry; shapes as `packed_attention`. The softmax is in fp32, as in
    Hugging Face's eager attention, which theirs derives from.
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    batched = lambda x: x.unflatten(0, (-1, length)).transpose(1, 2)  # noqa: E731  [B, heads, L, D]
    q, k, v, cos, sin = batched(q), *map(batched, (k, v)), *(batched(x[:, None]) for x in (cos, sin))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def scores(sin: Tensor) -> Tensor:
        turned = [x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k)]
        return turned[0] @ turned[1].transpose(-1, -2) * scale

    earlier = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = torch.where(earlier, scores(sin), scores(-sin)).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)


def measure(part: str, sizes: Sizes, deadline: float, findings: Findings) -> list[Any]:
    """What every backend sends, printed as it comes. Who failed, or cannot run here, goes into the findings."""
    work = check if part == "check" else speed
    opt_in = [name for name in KERNELS if name not in AUTO_ORDER]
    # The dense form is one case, and an aim.
    names = [*AUTO_ORDER, *((TRITON, TILES) if part == "check" else (DENSE, TRITON)), *opt_in]
    found: list[Any] = []
    for name in names:
        if (refused := refusal(name, sizes.shapes[0])) is not None:
            findings.add_note(f"{part}: {name} is not run: it {refused}")
            continue
        for item in sent(work, name, sizes, deadline):
            if isinstance(item, Ended):
                add_end(findings, f"{part}: {name}", item)
                if part == "check" and item.late and name not in findings.left_out:
                    findings.left_out.append(name)
                continue
            found.append(item)
            print(f"  {describe(item)}", flush=True)
    return found


def sent(work: Callable[..., None], name: str, sizes: Sizes, deadline: float) -> Iterator[Any]:
    """What the work on a backend sends, and how it ended.

    Some compile for seconds, and other kernels for each shape: their shapes are checked side by side.
    """
    if work is not check or name not in COMPILING:
        yield from each_alone(work, name, sizes, deadline=deadline)
        return
    shapes = [replace(sizes, shapes=(shape,)) for shape in sizes.shapes]
    with ThreadPoolExecutor(len(shapes)) as threads:
        found = threads.map(lambda one: list(each_alone(work, name, one, deadline=deadline)), shapes)
        yield from chain.from_iterable(found)


def describe(item: Comparison | Timing) -> str:
    if isinstance(item, Timing):
        return f"{item.way}, {item.case}: {item.ms:.3f} ms, {item.teraflop_per_second:.3g} TFLOP/s"
    return describe_comparison(item)


def report_check(found: list[Comparison], findings: Findings) -> None:
    """The worst case of each backend, dtype and head dimension; every wrong one by name."""
    for item in found:
        if not item.is_right:
            findings.add_wrong(describe(item))
    groups: dict[tuple[str, str, int], list[Comparison]] = {}
    for item in found:
        groups.setdefault((item.backend, item.dtype, item.head_dim), []).append(item)
    rows = []
    for (name, dtype, head_dim), items in groups.items():
        worst = max(items, key=lambda item: math.inf if item.largest_error is None else item.largest_error)
        right = sum(item.is_right for item in items)
        rows.append([name, dtype, head_dim, f"{right} of {len(items)}", worst.case, errors(worst)])
    columns = ["backend", "dtype", "head dimension", "right", "worst case", "its errors"]
    findings.add_table("Backends beside the dense fp64 oracle", columns, rows)


def report_speed(found: list[Timing], findings: Findings) -> None:
    """Every case by every way, what the Triton ops move, and the comparisons."""
    times = {(item.case, item.way): item for item in found}
    ways = list(dict.fromkeys(item.way for item in found))
    rows = []
    for case in dict.fromkeys(item.case for item in found):
        cells = [times.get((case, way)) for way in ways]
        rows.append([str(case), *(f"{t.ms:.3f} ({t.teraflop_per_second:.3g})" if t else "" for t in cells)])
    findings.add_table("Milliseconds (TFLOP/s), forward and backward", ["documents", *ways], rows)
    moved = [
        [str(t.case), t.launches, f"{t.gigabytes:.3g}", f"{t.gigabytes / t.ms * 1e3:.4g}"]
        for t in found
        if t.gigabytes is not None
    ]
    columns = ["documents", "launches", "GB by arithmetic", "GB/s reached"]
    findings.add_table("What the Triton ops launch and move, forward and backward", columns, moved)
    for name, ours, other in comparisons(times):
        findings.add_row(name, round(ours.ms, 4), round(other.ms, 4), "ms")
    findings.add_note(CONVENTION)


def comparisons(times: dict[tuple[Case, str], Timing]) -> Iterator[tuple[str, Timing, Timing]]:
    """What is compared, ours and the other, case by case."""
    for (case, way), other in times.items():
        fused = times.get((case, TRITON))
        op = times.get((case, way.removesuffix(" alone").removesuffix(PLAIN)))
        if fused is not None and way in KERNELS:
            passes = "two passes" if case.mode == "bidirectional" else "the op"
            yield (f"triton beside {passes} on {way}, {case}", fused, other)
        if op is not None and op is not other:
            yield (f"the op on {op.way} beside {way}, {case}", op, other)
            if fused is not None and way == alone(op.way):
                yield (f"triton beside {way}, {case}", fused, other)
        if way == DENSE:
            ours = [timing for (of, _), timing in times.items() if of == case and timing is not other]
            if ours:
                best = min(ours, key=lambda timing: timing.ms)
                yield (f"{best.way} beside {DENSE}, {case}", best, other)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, help="one part only")
    add_bench_options(parser, seconds=50)


def check_and_measure(options: Namespace) -> int:
    sizes = ON_CPU if options.rehearse else ON_GPU
    prepare(rehearse=options.rehearse)
    findings = Findings()
    for part in [options.part] if options.part else PARTS:
        print(f"{part}:", flush=True)
        found = measure(part, sizes, time.monotonic() + options.seconds, findings)
        (report_check if part == "check" else report_speed)(found, findings)
    return findings.finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=check_and_measure)


if __name__ == "__main__":
    main.start()
