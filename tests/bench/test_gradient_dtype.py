"""Sums of gradients in bf16, against additions rounded by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.bench.gradient_dtype import gradients_of, in_a_ring, in_a_tree, relative


def rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest of bf16, ties to even, by the bits of fp32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 11, 24])
def test_a_ring_rounds_at_every_hop_and_a_tree_at_every_level(ranks):
    seed = int(np.random.default_rng().integers(2**31))
    terms, _ = gradients_of(ranks, 300, noise=1.0, seed=seed)
    by_hand = terms[0].float().numpy()
    for term in terms[1:]:
        by_hand = rounded(by_hand + term.float().numpy())
    assert (in_a_ring(terms).float().numpy() == by_hand).all()
    exact = terms.double().sum(0).numpy()
    depth = min(ranks, 8) + max(0, int(np.ceil(np.log2(-(-ranks // 8)))))
    bound = depth * 2.0**-8 * terms.double().abs().sum(0).numpy()
    assert (np.abs(in_a_tree(terms).double().numpy() - exact) <= bound).all()


def test_a_long_ring_loses_what_its_ranks_agree_on():
    """A share of 1/512 is less than half of the last bit of a sum near 1."""
    terms = torch.full((512, 1), 1.0, dtype=torch.bfloat16) / 512
    assert in_a_ring(terms).item() == 0.5
    assert in_a_tree(terms).item() == 1.0
    assert relative(in_a_ring(terms), torch.ones(1)) == 0.5
