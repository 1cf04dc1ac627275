"""Checksums of weights: the formula, over any cut into slices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from bico_ds.model.weights.checksums import slice_checksum


def by_formula(flat: torch.Tensor) -> int:
    """Σ (2i + 1) · bits(x_i) mod 2^64, as a signed number; the bits as signed integers of their size."""
    raw = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]).numpy()
    total = sum((2 * index + 1) * int(bits) for index, bits in enumerate(raw.tolist())) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slices_of_any_length_add_up_to_the_formula(dtype):
    rng = np.random.default_rng()
    flat = torch.from_numpy(rng.normal(size=700_001)).to(dtype)
    cuts = [0, *sorted(rng.integers(0, len(flat), 4).tolist()), len(flat)]
    parts = [slice_checksum(flat[a:b], a) for a, b in pairwise(cuts)]
    total = sum(parts) % 2**64
    assert slice_checksum(flat, 0) % 2**64 == total == by_formula(flat) % 2**64
    assert slice_checksum(flat[:0], 5) == 0


def test_two_values_that_change_places_change_the_checksum():
    flat = torch.randn(1000)
    swapped = flat.clone()
    swapped[[3, 900]] = flat[[900, 3]]
    assert slice_checksum(swapped, 0) != slice_checksum(flat, 0)
