#!/usr/bin/env python
"""What the attention op costs on a CPU, beside the paper's dense formulation and beside itself.

    python tools/bench/attention.py [--quick] [--json]

Times are CPU seconds of one thread, forward and backward, the least of several runs, so that other work on the machine
counts little. Peak memory is what a fresh process needs beyond its inputs. Both sides are measured in one run.

Part 1: the paper's formulation (two full score matrices, tril + triu, one softmax) against ours. Part 2:
bidirectional against causal mode, at equal kept tokens; two passes cost 2, the arithmetic limit. Part 3: mask policies at
equal kept + live rows, against 15 % i.i.d. Part 4: many short documents (20 to 50 tokens, 9 query heads on 3
key heads), against a kernel call per document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import resolve
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.attention.packed import packed_attention, run_packed_attention
from bico_ds.attention.plan import AttentionPlan, Mode, build_plan
from bico_ds.common.command_line import Command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD_DIM = 8, 64
ONE_CALL_PER_DOCUMENT = LayoutPolicy(flash_from=1, tile_scores=1, tile_min_rows=1)


def inputs(rows: int, dtype: torch.dtype, heads: tuple[int, int] = (HEADS, HEADS)) -> list[Tensor]:
    """q, k, v (which require gradients), cos, sin, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    queries, keys = heads
    q, k, v = (random(rows, n, HEAD_DIM).requires_grad_() for n in (queries, keys, keys))
    frequency = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(rows)[:, None] * torch.cat([frequency, frequency])
    return [q, k, v, angle.cos().to(dtype), angle.sin().to(dtype), random(rows, queries, HEAD_DIM)]


def paper_dense(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The paper's formulation for one document without masked tokens, in the inputs' dtype."""
    half = HEAD_DIM // 2
    turn = lambda x, s: x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * s[:, None]  # noqa: E731
    score = lambda s: turn(q, s).transpose(0, 1) @ turn(k, s).permute(1, 2, 0)  # noqa: E731
    scores = (torch.tril(score(sin)) + torch.triu(score(-sin), 1)) * HEAD_DIM**-0.5
    return (torch.softmax(scores, -1) @ v.transpose(0, 1)).transpose(0, 1)


def cpu_seconds(attend: Callable[..., Tensor], tensors: list[Tensor], repeats: int) -> float:
    """Least CPU time of one forward and backward."""
    *arguments, grad_out = tensors
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.process_time()
        attend(*arguments).backward(grad_out)
        best = min(best, time.process_time() - started)
    return best


def ours(plan: AttentionPlan, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The op with its layout made beforehand, as by a worker of the loader."""
    backend = resolve("auto", dtype, HEAD_DIM, torch.device("cpu"))
    assert backend is not None
    layout = build_layout(plan, backend.policy).with_masks(dtype)
    return partial(packed_attention, plan=plan, layout=layout)


def one_document(length: int, mode: Mode = "bidirectional") -> AttentionPlan:
    return build_plan(mode, kept_lengths=[length])


def peak_megabytes(name: str, length: int, dtype: str) -> float:
    """Peak memory of a fresh process beyond its inputs and a warm-up on 64 tokens."""
    command = [sys.executable, __file__, "--peak-of", name, str(length), dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, length: int, dtype: str) -> None:
    for rows in (64, length):
        *arguments, grad_out = inputs(rows, DTYPES[dtype])
        attend = paper_dense if name == "dense" else ours(one_document(rows), DTYPES[dtype])
        before = memory_megabytes("VmRSS")
        attend(*arguments).backward(grad_out)
    print(memory_megabytes("VmHWM") - before)


def memory_megabytes(field: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM; ru_maxrss would inherit the parent's)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def against_dense(lengths: list[int], repeats: int) -> list[dict]:
    rows = []
    for dtype in DTYPES:
        for length in lengths:
            attend = ours(one_document(length), DTYPES[dtype])
            mine = cpu_seconds(attend, inputs(length, DTYPES[dtype]), repeats)
            dense = cpu_seconds(paper_dense, inputs(length, DTYPES[dtype]), 1 if length > 2048 else repeats)
            rows.append(row(f"time, dense ÷ ours, {dtype}, L = {length}", mine * 1e3, dense * 1e3, "CPU ms"))
        mine, dense = (peak_megabytes(name, lengths[-1], dtype) for name in ("ours", "dense"))
        rows.append(row(f"peak memory, dense ÷ ours, {dtype}, L = {lengths[-1]}", mine, dense, "MB"))
    return rows


def against_causal(lengths: list[int], repeats: int) -> list[dict]:
    rows = []
    for dtype in DTYPES:
        for length in lengths:
            both, causal = (
                cpu_seconds(
                    ours(one_document(length, mode), DTYPES[dtype]), inputs(length, DTYPES[dtype]), repeats
                )
                for mode in ("bidirectional", "causal")
            )
            rows.append(
                row(f"causal ÷ bidirectional, {dtype}, L = {length}", both * 1e3, causal * 1e3, "CPU ms")
            )
    return rows


MASKS = ("15 % i.i.d.", "40 % i.i.d.", "U(0, 1)", "spans, 40 %")


def masked_plan(policy: str, rows: int) -> AttentionPlan:
    """One document whose kept and live tokens together are about `rows`, under a mask policy."""
    random = np.random.default_rng(0)
    tokens = rows
    while True:
        mask = np.zeros(tokens, bool)
        if policy == "spans, 40 %":
            starts = random.choice(tokens // 10, size=tokens * 4 // 100, replace=False) * 10
            mask[(starts[:, None] + np.arange(10)).ravel()] = True
        else:
            rate = {"15 % i.i.d.": 0.15, "40 % i.i.d.": 0.4, "U(0, 1)": 0.67}[policy]
            mask = random.random(tokens) < rate
        mask[0] = False
        live = mask & np.append(mask[1:], False)
        if (~mask).sum() + live.sum() >= rows:
            split = np.cumsum(~mask)[live]
            return build_plan(
                "bidirectional",
                kept_lengths=[(~mask).sum()],
                live_document=np.zeros(split.size, np.int64),
                live_split=split,
            )
        tokens += 8


def against_iid(rows: int, repeats: int) -> list[dict]:
    """U(0, 1) stands as a document masked at 0.67, where more tokens are live (45 %) than under U(0, 1) itself (a third)."""
    results = []
    for dtype in DTYPES:
        plans = {name: masked_plan(name, rows) for name in MASKS}
        seconds = {
            name: cpu_seconds(ours(plan, DTYPES[dtype]), inputs(plan.num_rows, DTYPES[dtype]), repeats)
            for name, plan in plans.items()
        }
        for name, plan in plans.items():
            share = f"{plan.num_live / plan.num_rows:.0%} live of {plan.num_rows} rows"
            label = f"15 % i.i.d. ÷ {name}, {dtype} ({share})"
            results.append(row(label, seconds[name] * 1e3, seconds[MASKS[0]] * 1e3, "CPU ms"))
    return results


def short_documents(repeats: int) -> list[dict]:
    lengths = np.random.default_rng(0).integers(20, 51, 52)
    results = []
    for dtype in DTYPES:
        tensors = inputs(int(lengths.sum()), DTYPES[dtype], (9, 3))
        backend = Backend(kernel=CpuFlash(), policy=ONE_CALL_PER_DOCUMENT)
        for mode in ("bidirectional", "causal"):
            plan = build_plan(mode, kept_lengths=lengths)
            call_each = partial(
                run_packed_attention,
                plan=plan,
                scale=HEAD_DIM**-0.5,
                backend=backend,
                layout=build_layout(plan, backend.policy).with_masks(DTYPES[dtype]),
            )
            both = (ours(plan, DTYPES[dtype]), call_each)
            seconds = [cpu_seconds(attend, tensors, repeats) for attend in both]
            name = f"one call per document ÷ ours, 52 documents, {mode}, {dtype}"
            results.append(row(name, seconds[0] * 1e3, seconds[1] * 1e3, "CPU ms"))
    return results


def row(name: str, mine: float, other: float, unit: str) -> dict:
    return {
        "name": name,
        "ours": round(mine, 2),
        "other": round(other, 2),
        "unit": unit,
        "ratio": round(other / mine, 3),
    }


def print_table(rows: list[dict]) -> None:
    table = Table("what", "ours", "other", "unit", "other ÷ ours")
    for line in rows:
        table.add_row(
            line["name"], f"{line['ours']:.1f}", f"{line['other']:.1f}", line["unit"], f"{line['ratio']:.2f}"
        )
    Console(width=130).print(table)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="lengths up to 2048, fewer runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--peak-of", nargs=3, metavar=("NAME", "LENGTH", "DTYPE"), help=SUPPRESS)


def run(options: Namespace) -> None:
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(options.peak_of[0], int(options.peak_of[1]), options.peak_of[2])
        return
    for dtype in DTYPES.values():
        # Builds the fused kernel before anything is timed.
        resolve("auto", dtype, HEAD_DIM, torch.device("cpu"))
    repeats = 2 if options.quick else 4
    lengths = [512, 2048] if options.quick else [128, 512, 2048, 4096]
    rows = short_documents(repeats + 4) + against_iid(2048, repeats) + against_causal(lengths[1:], repeats)
    rows += against_dense(lengths, repeats)
    print(f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}")
    print_table(rows)
    if options.json:
        print(json.dumps({"rows": rows}))


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
