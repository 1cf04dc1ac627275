"""liger-kernel's own kernels in Triton's interpreter, called as in training: right beside Hugging Face's modules."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from bico_ds.model.elementwise_kernels import LigerKernels
from bico_ds.proof.findings import Findings
from tools.bench import gpu_elementwise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None,
        reason="liger-kernel is not installed (extra 'liger')",
    ),
]


class Scalar(float):
    """A kernel's argument as Triton's compiler has it, and its interpreter does not: it can be cast."""

    def to(self, dtype: object) -> Scalar:
        return self


def what_is_wrong(loses_the_sum: bool) -> list[str]:
    """In fp32, in the process with the interpreter, for which three things of the kernels are replaced."""
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, rms_norm, swiglu

    # A function of CUDA's library, and scalars.
    fused_add_rms_norm.rsqrt = rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    swiglu.float = Scalar
    gpu_elementwise.EPS = Scalar(gpu_elementwise.EPS)
    kernels = LigerKernels()
    kernels._LIKE_LLAMA = {**LigerKernels._LIKE_LLAMA, "offset": Scalar(0)}
    if loses_the_sum:
        backward = kernels.norm_backward
        kernels.norm_backward = lambda grad, grad_sum, *rest: backward(grad, None, *rest)
    findings = Findings()
    for case in gpu_elementwise.cases_of(kernels, gpu_elementwise.REHEARSAL):
        gpu_elementwise.check(case, torch.float32, torch.device("cpu"), findings)
    return findings.wrong


@pytest.mark.parametrize("loses_the_sum", [False, True])
def test_the_installed_kernels_compute_norms_and_gates(monkeypatch, loses_the_sum):
    # Read when Triton is imported, which may have been in this process.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        wrong = process.submit(what_is_wrong, loses_the_sum).result()
    expected = [
        "norm of a sum, and the sum, float32: gradient 0",
        "norm of a sum, and the sum, float32: gradient 1",
    ]
    assert [text.split(" is off")[0] for text in wrong] == expected * loses_the_sum
