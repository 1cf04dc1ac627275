"""liger-kernel's part of norms and gates, without a GPU: each call binds to its signatures; what runs is said once."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from bico_ds.model import elementwise_kernels
from bico_ds.model.elementwise import add_rms_norm, rms_norm, swiglu
from bico_ds.model.elementwise_kernels import LigerKernels, kernels_for, without_kernels
from bico_ds.native.triton_kernels import triton_missing
from tests.model.liger_package import RECORDS, liger_on_cpu, read
from tests.model.test_elementwise import EPS, exact_norm, with_gradients

LIGER = LigerKernels()
CUDA = torch.device("cuda")


def sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return exact_norm(x + residual, weight), x + residual


# By name: through liger's kernels, the formula, and the number of inputs [..., E]; the norms have a weight [E], too.
FORMS = {
    "norm": (lambda x, w: rms_norm(x, w, EPS, LIGER), exact_norm, 1),
    "norm of a sum, and the sum": (
        lambda x, r, w: torch.stack(add_rms_norm(x, r, w, EPS, LIGER)),
        lambda x, r, w: torch.stack(sum_and_norm(x, r, w)),
        2,
    ),
    "norm of a sum alone": (
        lambda x, r, w: add_rms_norm(x, r, w, EPS, LIGER)[0],
        lambda x, r, w: sum_and_norm(x, r, w)[0],
        2,
    ),
    "sum alone": (
        lambda x, r, w: add_rms_norm(x, r, w, EPS, LIGER)[1] + 0 * w,
        lambda x, r, w: x + r + 0 * w,
        2,
    ),
    "gate": (lambda g, u: swiglu(g * 1, u * 1, LIGER), lambda g, u: silu(g) * u, 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_each_call_binds_to_ligers_signature_and_gives_the_formula_with_gradients(record, form):
    """In fp64, which only the stand-in takes; rows that are not contiguous are made so."""
    ours, formula, count = FORMS[form]
    inputs = [torch.randn(24, 3, 5, dtype=torch.float64).transpose(0, 2) for _ in range(count)]
    weight = [] if form == "gate" else [torch.randn(24, dtype=torch.float64)]
    with liger_on_cpu(read(record)):
        found = with_gradients(ours, *inputs, *weight)
    for a, b in zip(found, with_gradients(formula, *inputs, *weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_through_a_gate_that_was_written_over_fails():
    with liger_on_cpu(read(RECORDS[-1])):
        out = swiglu(*(torch.randn(4, 8, requires_grad=True) * 1 for _ in range(2)), LIGER).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed (extra 'liger')"
)
def test_the_installed_release_has_the_newest_recorded_signatures():
    release = read(RECORDS[-1])
    for name, functions in release["modules"].items():
        for function, recorded in functions.items():
            found = inspect.signature(getattr(importlib.import_module(name), function))
            assert list(found.parameters) == [
                part.split(":")[0].split("=")[0].strip() for part in recorded["parameters"].split(",")
            ]
    norms = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    assert norms._str_to_casting_mode["llama"] == 0 == LIGER._LIKE_LLAMA["casting_mode"]


@pytest.fixture
def installed(monkeypatch, caplog):
    """Sets which release of liger-kernel is installed; gives the kernels for CUDA twice, and what the log says."""

    def choose(version):
        def find(name):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", find)
        with caplog.at_level(logging.INFO):
            chosen = [kernels_for(torch.bfloat16, torch.device("cuda", index)) for index in (0, 1)]
        assert chosen[0] is chosen[1]
        return chosen[0], [record.getMessage() for record in caplog.records]

    elementwise_kernels._kernels_on.cache_clear()
    yield choose
    elementwise_kernels._kernels_on.cache_clear()


@pytest.mark.skipif(triton_missing(CUDA) is not None, reason=f"liger-kernel {triton_missing(CUDA)}")
class TestOnCuda:
    def test_without_it_hugging_faces_modules_run_and_the_log_says_once_how_to_install_it(self, installed):
        kernels, said = installed(None)
        assert kernels is None
        assert said == [
            "norms and gates: Hugging Face's own modules, in many passes over memory: liger-kernel is not installed "
            "(pip install 'bico_ds[liger]')"
        ]

    def test_too_old_a_release_is_not_called(self, installed):
        kernels, (said,) = installed("0.7.0")
        assert kernels is None
        assert "liger-kernel 0.8 or newer is needed, 0.7.0 is installed" in said

    def test_it_serves_where_it_is_installed(self, installed):
        with liger_on_cpu(read(RECORDS[0])):
            kernels, said = installed("0.8.0")
        assert isinstance(kernels, LigerKernels)
        assert said == ["norms and gates: liger-kernel"]

    def test_it_takes_no_fp64(self):
        assert kernels_for(torch.float64, CUDA) is None


def test_without_kernels_every_device_has_none():
    meta = torch.device("meta")
    assert kernels_for(torch.bfloat16, meta) is not None
    with without_kernels():
        assert all(kernels_for(torch.bfloat16, device) is None for device in (meta, torch.device("cpu")))
    assert kernels_for(torch.bfloat16, meta) is not None
