#!/usr/bin/env python
"""DeepSpeed's own FusedAdam: whether it compiles here, and computes what torch's fused AdamW does.

    python tools/bench/gpu_fused_adam.py [--rehearse] [--json]

Recipes use it on CUDA; DeepSpeed compiles it by nvcc at the first use. Both optimizers take the same steps from the same
weights. Without nvcc nothing is measured, which is no failure. --rehearse: on a CPU, torch's plain AdamW in the place of
DeepSpeed's, which compiles for minutes there. Exit code 1 if it does not compile, or the weights differ.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.proof.findings import Findings
from bico_ds.runtime.deepspeed_ops import (
    prefer_own_ninja,
    release_abandoned_locks,
    write_readable_architectures,
)
from bico_ds.runtime.device_speed import synchronize

SHAPES = ((1, 3), (257,), (1024, 513))
BIG = (4096, 4096)  # on a GPU, so that a step takes longer than its launch
STEPS = 3
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TOLERANCE = 1e-5
"""Of a weight of about 1, after three steps of 1e-2: both compute in fp32, in another order of the same operations."""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="torch's plain AdamW on a CPU, in its place")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def has_nvcc() -> bool:
    return CUDA_HOME is not None and os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc"))


def steps(optimizer: torch.optim.Optimizer, weights: list[Tensor], device: torch.device) -> float:
    """Take `STEPS` steps with the same random gradients; returns the milliseconds of the last."""
    for step in range(STEPS):
        generator = torch.Generator(device).manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, device=device)
        synchronize(device)
        started = time.perf_counter()
        optimizer.step()
        synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def compare(device: torch.device, kind: Callable[..., torch.optim.Optimizer], name: str) -> Findings:
    """An optimizer of this `kind` beside torch's fused AdamW, on equal weights."""
    generator = torch.Generator(device).manual_seed(99)
    shapes = (*SHAPES, BIG) if device.type == "cuda" else SHAPES
    ours = [torch.randn(shape, generator=generator, device=device).requires_grad_() for shape in shapes]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    print(f"loading {name} …", flush=True)
    started = time.perf_counter()
    optimizer = kind(ours, **SETTINGS)
    seconds = time.perf_counter() - started
    ms, torch_ms = (
        steps(each, weights, device)
        for each, weights in ((optimizer, ours), (torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs))
    )
    pairs = zip(ours, theirs, strict=True)
    # Torch's maximum passes over no NaN, as Python's does.
    difference = float(torch.stack([(a - b).detach().abs().max() for a, b in pairs]).max())
    findings = Findings()
    findings.add_note(
        f"compiled or loaded in {seconds:.1f} s; largest difference of a weight {difference:.1e} after {STEPS} steps"
    )
    findings.add_row(f"a step of {name} beside torch's fused AdamW", round(ms, 3), round(torch_ms, 3), "ms")
    if not difference <= TOLERANCE:
        findings.add_wrong(f"{name}: a weight differs by {difference:.1e}, more than {TOLERANCE:.0e}")
    return findings


def measure(options: Namespace) -> Findings:
    if options.rehearse:
        return compare(torch.device("cpu"), torch.optim.AdamW, "torch's plain AdamW (in a rehearsal)")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device; --rehearse runs on a CPU")
    if not has_nvcc():
        print("not measured: no nvcc", flush=True)
        return Findings(not_measured="no nvcc")
    from deepspeed.ops.adam import FusedAdam

    prefer_own_ninja()
    write_readable_architectures()
    # A compilation that was cut leaves its lock, for which the next one would wait without end.
    release_abandoned_locks()
    return compare(torch.device("cuda", 0), FusedAdam, "DeepSpeed's FusedAdam")


def run(options: Namespace) -> int:
    return measure(options).finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
