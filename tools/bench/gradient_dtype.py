#!/usr/bin/env python
"""The error of gradients that ranks reduce in bf16, simulated: DeepSpeed's division, then a ring's or a tree's additions.

    python tools/bench/gradient_dtype.py [--ranks 2 8 64 512] [--elements 16384]

An element of the mean gradient is of a magnitude of its own (log-normal, a factor of e^2 per standard deviation); a rank's
differs from it by noise of 0, 1, 10 or 100 times that magnitude, as those of small batches do. All are rounded to bf16, as a
backward pass leaves them. The error is that of the whole vector against the exact mean of the rounded ones, in the 2-norm;
beside it stands what the noise does to the mean by itself.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import positive

NOISES = (0.0, 1.0, 10.0, 100.0)
RANKS_OF_NODE = 8


def gradients_of(ranks: int, elements: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ranks' gradients, (ranks, elements) in bf16, and the mean that they are drawn around, (elements,) in fp32."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp(2 * torch.randn(elements, generator=generator))
    mean = magnitudes * torch.randn(elements, generator=generator)
    return (mean + noise * magnitudes * torch.randn(ranks, elements, generator=generator)).bfloat16(), mean


def in_a_ring(terms: Tensor) -> Tensor:
    """The sum over ranks, (ranks, elements) to (elements,), rounded to the terms' type at every hop."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def in_a_tree(terms: Tensor) -> Tensor:
    """The same, in a chain through each node and pairwise over the nodes, as NCCL's trees for all-reduces."""
    sums = torch.stack([in_a_ring(node) for node in terms.split(RANKS_OF_NODE)])
    while len(sums) > 1:
        pairs = sums[0 : len(sums) // 2 * 2 : 2] + sums[1::2]
        sums = torch.cat([pairs, sums[len(sums) // 2 * 2 :]])
    return sums[0]


def relative(found: Tensor, exact: Tensor) -> float:
    """The error of a vector, in the 2-norm and as a share of the exact one."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 8, 24, 64, 512])
    parser.add_argument("--elements", type=positive, default=16_384)
    parser.add_argument("--seed", type=int, default=1)


def run(options: Namespace) -> None:
    table = Table("ranks", "noise", "ring, bf16", "tree, bf16", "ring, fp32", "what the noise does")
    for ranks in options.ranks:
        for noise in NOISES:
            gradients, mean = gradients_of(ranks, options.elements, noise, options.seed)
            exact = gradients.double().mean(0)
            # As DeepSpeed: the division first, in the type of communication.
            found = [
                relative(in_a_ring(gradients / ranks), exact),
                relative(in_a_tree(gradients / ranks), exact),
                relative(in_a_ring(gradients.float() / ranks), exact),
                relative(exact, mean),
            ]
            table.add_row(str(ranks), f"{noise:g}", *(f"{error:.2g}" for error in found))
    Console(soft_wrap=True).print(table)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
