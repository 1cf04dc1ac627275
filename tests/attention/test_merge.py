"""One softmax from two: the log-sum-exp merge at its edges."""

from __future__ import annotations

import pytest
import torch

from bico_ds.attention.inputs import AttentionResults
from bico_ds.attention.passes import merge


def merged(out, lse, out2, lse2, rows):
    """out [N, H, D] and lse [H, N] of the merge; lse as kernels give it, a column per row."""
    results = AttentionResults(out=out, lse=lse.t())
    merge(results, AttentionResults(out=out2, lse=lse2.t()), rows)
    return results.out, results.lse.t()


@pytest.mark.parametrize("distance", [0.0, 3.0, 80.0, -80.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_weighs_by_exp_of_lse_at_any_distance(distance, dtype):
    torch.manual_seed(0)
    out, out2 = torch.randn(5, 2, 8).to(dtype), torch.randn(3, 2, 8).to(dtype)
    lse, rows = torch.randn(2, 5), torch.tensor([4, 2, 0])
    lse2 = lse[:, rows] + distance
    expected, expected_lse = out.double(), lse.double()
    weights = torch.softmax(torch.stack([lse[:, rows], lse2]).double(), 0).transpose(1, 2).unsqueeze(-1)
    expected[rows] = weights[0] * out[rows].double() + weights[1] * out2.double()
    expected_lse[:, rows] = torch.logaddexp(lse[:, rows].double(), lse2.double())
    found, found_lse = merged(out, lse, out2, lse2, rows)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )
    torch.testing.assert_close(found_lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_a_second_pass_without_weight_leaves_the_base_bit_for_bit():
    out, lse = torch.randn(5, 2, 8), torch.randn(2, 5)
    found, found_lse = merged(
        out.clone(), lse.clone(), torch.full((5, 2, 8), 1e4), torch.full((2, 5), -1e4), torch.arange(5)
    )
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)
