"""tools/bench/gpu_elementwise.py: what it takes for wrong, on a CPU by its own kernels."""

from __future__ import annotations

import pytest
import torch

from bico_ds.model.elementwise_kernels import NativeKernels
from bico_ds.native.library import native_refusal
from bico_ds.proof.findings import Findings
from tools.bench.gpu_elementwise import REHEARSAL, cases_of, check

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=f"the fused kernels: {native_refusal()}")
CPU = torch.device("cpu")


class WithoutTheSum(NativeKernels):
    """Loses the gradient that a sum has by itself."""

    def norm_backward(self, grad, grad_sum, x, weight, inverse):
        return super().norm_backward(grad, None, x, weight, inverse)


class TooMuchUp(NativeKernels):
    def gate_backward(self, grad, gate, up):
        dgate, dup = super().gate_backward(grad, gate, up)
        return dgate, dup * 1.02


class NoNumber(NativeKernels):
    def norm(self, x, weight, eps):
        out, inverse = super().norm(x, weight, eps)
        out[-1, -1] = torch.nan
        return out, inverse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kernels", "wrong"),
    [
        (NativeKernels(), {}),
        (WithoutTheSum(), {"norm of a sum, and the sum": ["gradient 0", "gradient 1"]}),
        (TooMuchUp(), {"gate": ["gradient 1"]}),
        (
            NoNumber(),
            {
                "norm of a sum, and the sum": ["result 0"],
                "norm": ["result 0"],
                "norms of heads": ["result 0"],
            },
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, NativeKernels) else "",
)
def test_wrong_is_what_is_further_off_than_hugging_faces_rounding(kernels, wrong, dtype):
    for case in cases_of(kernels, REHEARSAL):
        findings = Findings()
        check(case, dtype, CPU, findings)
        found = [text.split(": ")[1].split(" is off")[0] for text in findings.wrong]
        assert found == wrong.get(case.name, []), findings.wrong
