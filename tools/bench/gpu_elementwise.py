#!/usr/bin/env python
"""Norms, with and without a residual, and gates: are the kernels right beside Hugging Face's modules, and how fast?

    python tools/bench/gpu_elementwise.py [--rehearse] [--json]

At the rows of a Llama-3-8B step, forward and backward. Right is what is at most twice as far as Hugging Face's module from
the formula in fp64, in every result and gradient. --rehearse: few rows on a CPU, by its own kernels. Exit code 1 where
something is wrong. Where no kernels run, nothing is measured, which is no failure.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import this_checkout  # noqa: F401  first on sys.path
import torch
from attention_cases import milliseconds
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.model.elementwise import add_rms_norm, rms_norm, swiglu
from bico_ds.model.elementwise_kernels import ElementwiseKernels, kernels_for
from bico_ds.proof.findings import Findings

EPS = 1e-5
MARGIN = 2.0
"""Times Hugging Face's error: both round the same results once or twice, and sum in fp32."""
LEAST = {torch.bfloat16: 2e-3, torch.float32: 3e-7}
"""An error that Hugging Face's modules may have by luck less than: some roundings of a dtype."""
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows, their width at a norm and at a gate, and the heads that Qwen3 norms one by one."""

    rows: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int


LLAMA_8B = Sizes(rows=8192, hidden=4096, intermediate=14336, heads=32, head_dim=128)
REHEARSAL = Sizes(rows=24, hidden=64, intermediate=96, heads=2, head_dim=16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed of inputs with these shapes: by the kernels, by Hugging Face's modules, and by the formula in fp64.

    An input of one dimension is a norm's weight. The backward pass of `ours` may write over the inputs.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Function
    theirs: Function
    exact: Function

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        drawn = [torch.randn(shape, device=device) for shape in self.shapes]
        return [(1 + 0.1 * x if x.ndim == 1 else x).to(dtype) for x in drawn]


def their_norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    module = LlamaRMSNorm(x.shape[-1], eps=EPS)
    return (torch.func.functional_call(module, {"weight": weight}, (x,)),)


def exact_norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt(),)


def and_sum(norm: Function, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = residual + x
    return (*norm(total, weight), total)


def gated(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (silu(gate) * up,)


def cases_of(kernels: ElementwiseKernels, sizes: Sizes) -> list[Case]:
    rows, wide = (sizes.rows, sizes.hidden), (sizes.rows, sizes.intermediate)
    norm = partial(
        Case, ours=lambda x, w: (rms_norm(x, w, EPS, kernels),), theirs=their_norm, exact=exact_norm
    )
    return [
        Case(
            name="norm of a sum, and the sum",
            shapes=(rows, rows, (sizes.hidden,)),
            ours=lambda x, residual, w: add_rms_norm(x, residual, w, EPS, kernels),
            theirs=partial(and_sum, their_norm),
            exact=partial(and_sum, exact_norm),
        ),
        norm(name="norm", shapes=(rows, (sizes.hidden,))),
        norm(name="norms of heads", shapes=((sizes.rows * sizes.heads, sizes.head_dim), (sizes.head_dim,))),
        Case(
            name="gate",
            shapes=(wide, wide),
            ours=lambda gate, up: (swiglu(gate, up, kernels),),
            theirs=gated,
            exact=gated,
        ),
    ]


def with_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of the inputs for one slope, whatever the dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    slope = torch.linspace(-1, 1, results[0].shape[-1], device=leaves[0].device).bfloat16()
    slopes = [slope.to(x.dtype).expand_as(x).contiguous() for x in results]
    return [*results, *torch.autograd.grad(results, leaves, slopes)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The root of the mean square of each result's error, by that of its values; NaN where one is."""
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]


def check(case: Case, dtype: torch.dtype, device: torch.device, findings: Findings) -> None:
    """Add what is wrong, and a note of the errors where nothing is."""
    inputs = case.inputs(dtype, device)
    exact = with_gradients(case.exact, [x.double() for x in inputs])
    ours, theirs = (
        errors(with_gradients(way, [x.clone() for x in inputs]), exact) for way in (case.ours, case.theirs)
    )
    what = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    gradients = [f"gradient {number}" for number in range(len(inputs))]
    names = [*(f"result {number}" for number in range(len(exact) - len(inputs))), *gradients]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        if not mine <= MARGIN * max(other, LEAST[dtype]):
            findings.add_wrong(f"{what}: {name} is off by {mine:.1e}, Hugging Face's by {other:.1e}")
    findings.add_note(f"{what}: errors up to {max(ours):.1e}, Hugging Face's up to {max(theirs):.1e}")


def time(case: Case, dtype: torch.dtype, device: torch.device, findings: Findings) -> None:
    inputs = case.inputs(dtype, device)
    ours, theirs = (
        milliseconds(partial(with_gradients, way, inputs), device=device.type)
        for way in (case.ours, case.theirs)
    )
    name = f"{case.name} of {tuple(inputs[0].shape)}, forward and backward, beside Hugging Face's"
    findings.add_row(name, round(ours, 3), round(theirs, 3), "ms")


def measure(options: Namespace) -> Findings:
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no CUDA device; --rehearse runs on a CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    findings, dtypes = Findings(), list(LEAST)
    kernels = kernels_for(dtypes[0], device)
    if kernels is None:
        findings.not_measured = "no kernels for norms and gates run here"
        return findings
    torch.manual_seed(1)
    for case in cases_of(kernels, REHEARSAL if options.rehearse else LLAMA_8B):
        for dtype in dtypes:
            check(case, dtype, device, findings)
        time(case, dtypes[0], device, findings)
    return findings


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="few rows on a CPU, by its own kernels")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: Namespace) -> int:
    return measure(options).finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
