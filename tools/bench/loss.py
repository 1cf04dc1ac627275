#!/usr/bin/env python
"""What the loss head needs: peak memory and time at 8192 rows and a vocabulary of 128256, by rows per chunk.

    python tools/bench/loss.py [--rows 8192] [--hidden 1024] [--plain] [--json]

Memory (Linux only) is the growth of a fresh process's peak beyond hidden states, weight and the gradients of both; its other
side is a bound of 512 MB. Times are CPU seconds of one thread, forward and backward, beside those of the default's 512
rows. `--plain` adds the plain cross entropy with all logits at once, as Hugging Face's models compute it. The memory
depends on the hidden size through the gradients alone, which are not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from bico_ds.common.command_line import Command
from bico_ds.model.head import chunked_cross_entropy

VOCABULARY = 128256
DEFAULT_CHUNK = 512
LIMIT_MB = 512.0


def measure(chunk_rows: int, rows: int, hidden_size: int) -> dict[str, float]:
    """One forward and backward in this process; `chunk_rows` 0: all logits at once."""
    torch.set_num_threads(1)
    hidden = torch.randn(rows, hidden_size).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden_size) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows,))
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    gradient_bytes = 2 * (hidden.numel() + weight.numel())
    before = peak_from_here()
    started = time.process_time()
    if chunk_rows:
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)[0]
    else:
        loss = cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    loss.backward()
    seconds = time.process_time() - started
    return {"megabytes": (peak_bytes() - before - gradient_bytes) / 1e6, "seconds": seconds}


def peak_from_here() -> int:
    """Let the kernel forget the peak of this process so far, which its start may have set; memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_fresh_process(chunk_rows: int, options: Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(chunk_rows)]
    command += ["--rows", str(options.rows), "--hidden", str(options.hidden)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, DEFAULT_CHUNK, 1024])
    parser.add_argument("--plain", action="store_true", help="also all logits at once: 17 GB at the defaults")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=int, help=SUPPRESS)


def run(options: Namespace) -> None:
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.rows, options.hidden)))
        return
    chunks = [*options.chunks, *([0] if options.plain else [])]
    measured = {chunk: in_fresh_process(chunk, options) for chunk in chunks}
    default = measured.get(DEFAULT_CHUNK) or in_fresh_process(DEFAULT_CHUNK, options)
    table = Table(
        "rows per chunk", "peak MB beyond the gradients", "of the bound", "CPU s", "of the default's"
    )
    rows = []
    for chunk, ours in measured.items():
        name = {0: "all at once (plain)", DEFAULT_CHUNK: f"{chunk} (default)"}.get(chunk, str(chunk))
        memory, seconds = ours["megabytes"] / LIMIT_MB, ours["seconds"] / default["seconds"]
        table.add_row(
            name, f"{ours['megabytes']:.0f}", f"{memory:.2f}", f"{ours['seconds']:.1f}", f"{seconds:.2f}"
        )
        rows.append(
            (f"peak against the bound, rows per chunk: {name}", ours["megabytes"], LIMIT_MB, "MB", memory)
        )
        rows.append(
            (
                f"time against the default, rows per chunk: {name}",
                ours["seconds"],
                default["seconds"],
                "CPU s",
                seconds,
            )
        )
    Console(soft_wrap=True).print(table)
    if options.json:
        keys = ("name", "ours", "other", "unit", "ratio")
        print(json.dumps({"rows": [dict(zip(keys, row, strict=True)) for row in rows]}))


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
