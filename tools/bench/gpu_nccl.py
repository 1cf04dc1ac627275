#!/usr/bin/env python
"""The collectives of NCCL with one rank: whether they work here, and how long each takes.

    python tools/bench/gpu_nccl.py [--rehearse] [--json]

One rank moves no data to another: a driver or library that fails shows itself all the same, and a hang is a finding. The
network between nodes is the pre-flight's. --rehearse: gloo, on a CPU. Exit code 1 if a collective fails or is wrong.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import this_checkout  # noqa: F401  first on sys.path
import torch
import torch.distributed as dist
from torch import Tensor

from bico_ds.cluster.preflight.network import ELEMENTS, timed
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.proof.findings import Findings
from bico_ds.runtime.distributed import begin_group

SECONDS = 30  # for one collective


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="gloo on a CPU")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def collectives(source: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """What training uses, from `source` to `target` (all-reduce in `source`); with one rank all deliver what went in."""
    return {
        "all-reduce": partial(dist.all_reduce, source),
        "all-gather": partial(dist.all_gather_into_tensor, target, source),
        "reduce-scatter": partial(dist.reduce_scatter_tensor, target, source),
        "barrier": dist.barrier,
    }


def measure(device: torch.device) -> Findings:
    """Join, time each collective, compare what it delivers, leave."""
    kind = "nccl" if device.type == "cuda" else "gloo"
    print(f"joining a group of one rank by {kind}", flush=True)
    begin_group(device, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=SECONDS))
    source = torch.randn(ELEMENTS[device.type], device=device)
    expected, target = source.clone(), torch.empty_like(source)
    findings, times = Findings(), []
    for name, work in collectives(source, target).items():
        print(f"{name} …", end=" ", flush=True)
        target.copy_(expected)
        if "scatter" in name or "gather" in name:
            target.zero_()
        try:
            milliseconds = 1e3 * timed(work, device, with_barrier=False)
        except RuntimeError as error:
            findings.add_wrong(f"{name} by {kind}: {str(error).splitlines()[0]}")
            continue
        if not (torch.equal(source, expected) and torch.equal(target, expected)):
            findings.add_wrong(f"{name} by {kind} delivers wrong values")
        times.append([name, round(milliseconds, 3)])
        print(f"{milliseconds:.3f} ms", flush=True)
    print("leaving the group", flush=True)
    dist.destroy_process_group()
    size = f"{source.nbytes / 1e6:.0f} MB"
    findings.add_table(f"{kind}, one rank, {size}", ["collective", "ms"], times)
    return findings


def run(options: Namespace) -> int:
    # torch 2.13 has renamed collectives, and warns of the old names, which older versions need.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no CUDA device; --rehearse runs gloo on a CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    return measure(device).finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
