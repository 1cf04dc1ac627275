"""Choice of backend: what `auto` takes and logs, and one clear line where a backend cannot run."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from typing import get_args

import pytest
import torch

from bico_ds.attention import backends
from bico_ds.attention.kernels.flash_attn3 import FlashAttn3
from bico_ds.attention.kernels.flash_limits import flash3_refusal
from bico_ds.attention.packed import packed_attention
from bico_ds.config.sections.model import ModelSpec
from tests import ROOT
from tests.attention.attention_problems import make_problem, relative_errors

CPU = torch.device("cpu")


def test_auto_on_cpu_takes_the_cpu_kernel_and_says_so_once(caplog):
    backends.resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            backend = backends.resolve("auto", torch.float32, 64, CPU)
    assert backend.kernel.name == "cpu-flash"
    assert len(caplog.records) == 1
    assert "cpu-flash for cpu, float32" in caplog.text


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3", "flash-attn-4", "aten-cuda", "triton"])
def test_a_backend_that_cannot_run_says_why_and_what_would(name):
    with pytest.raises(ValueError, match=f"'{name}' .*use one of: cpu-flash") as error:
        backends.resolve(name, torch.bfloat16, 64, CPU)
    assert "\n" not in str(error.value)


def test_auto_serves_what_no_cuda_kernel_takes_by_tiles_alone_and_warns(caplog):
    backends.resolve.cache_clear()
    with caplog.at_level(logging.WARNING, logger=backends.__name__):
        backend = backends.resolve("auto", torch.float32, 64, torch.device("cuda"))
    assert backend.policy.flash_from == math.inf
    assert "dense tiles" in caplog.text
    assert "takes float16 or bfloat16, not float32" in caplog.text


@pytest.mark.parametrize("head_dim", [4, 264])
def test_triton_refuses_head_dimensions_that_its_kernels_do_not_take(head_dim):
    with pytest.raises(ValueError, match="'triton' takes head dimensions that are multiples of 8 up to 256"):
        backends.resolve("triton", torch.bfloat16, head_dim, torch.device("meta"))


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from bico_ds.attention import backends
from bico_ds.attention.packed import packed_attention
from tests.attention.attention_problems import make_problem
problem = make_problem([70, 1, 33]).to(torch.bfloat16)
problem.packed(packed_attention)
try:
    problem.packed(packed_attention, backend="triton")
except ValueError as error:
    print(error)
"""


def test_attention_needs_no_triton_but_where_it_is_named():
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "attention backend 'triton' needs Triton, which is not installed" in answer.stdout


@pytest.mark.parametrize(
    ("capability", "head_dim", "deterministic", "said"),
    [
        ((9, 0), 256, False, None),
        ((9, 0), 192, True, None),
        ((9, 0), 200, True, "takes head dimensions that are multiples of 8 up to 192, not 200"),
        ((8, 0), 128, False, "needs compute capability 9.0, An invented GPU has 8.0"),
        ((10, 0), 128, False, "is compiled for Hopper alone, not for An invented GPU"),
    ],
)
def test_flash_attn_3_serves_hopper_alone(capability, head_dim, deterministic, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An invented GPU")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert flash3_refusal(torch.bfloat16, head_dim, torch.device("cuda")) == said


def test_a_missing_flash_attn_3_is_told_where_it_is():
    refusal = FlashAttn3().refusal(torch.bfloat16, 128, torch.device("meta"))
    assert "pip install flash-attn-3 --find-links https://download.pytorch.org" in refusal


def test_a_backend_may_be_given_as_such():
    problem = make_problem([9, 4]).to(torch.float32)
    by_name = problem.packed(packed_attention, backend="cpu-flash")
    given = problem.packed(packed_attention, backend=backends.resolve("cpu-flash", torch.float32, 16, CPU))
    assert all(map(torch.equal, by_name, given))


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown attention backend 'flsh': choose one of auto, flash-attn"):
        packed_attention_of_anything("flsh")


def test_oracle_is_no_kernel():
    assert backends.resolve("oracle", torch.float32, 64, CPU) is None


def packed_attention_of_anything(backend):
    problem = make_problem([4], mask_rate=0.0)
    return problem.packed(packed_attention, backend=backend)


class Formula:
    """A backend written as docs/extend.md describes it: the causal softmax of each document, in fp64."""

    name = "formula"
    hides_keys = False

    def __init__(self):
        self.calls = 0

    def refusal(self, dtype, head_dim, device):
        return None if dtype == torch.float64 else "takes float64 only"

    def forward(self, q, k, v, *, cu_seqlens, max_seqlen, scale, hidden=None):
        self.calls += 1
        scores = self._scores(q, k, cu_seqlens, scale)
        return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), self._shared(v, q)), scores.logsumexp(-1)

    def backward(self, grad_out, q, k, v, out, lse, *, cu_seqlens, max_seqlen, scale, hidden=None):
        weights = (self._scores(q, k, cu_seqlens, scale) - lse[..., None]).exp()
        d_weights = torch.einsum("mhd,nhd->hmn", grad_out, self._shared(v, q))
        d_scores = weights * (d_weights - (grad_out * out).sum(-1).t()[..., None]) * scale
        group = lambda x: x.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
        dq = torch.einsum("hmn,nhd->mhd", d_scores, self._shared(k, q))
        dk, dv = torch.einsum("hmn,mhd->nhd", d_scores, q), torch.einsum("hmn,mhd->nhd", weights, grad_out)
        return dq, group(dk), group(dv)

    def _scores(self, q, k, cu_seqlens, scale):
        row = torch.arange(len(q))
        document = torch.bucketize(row, cu_seqlens[1:], right=True)
        seen = (document[:, None] == document) & (row[:, None] >= row)
        scores = torch.einsum("mhd,nhd->hmn", q, self._shared(k, q)) * scale
        return scores.masked_fill(~seen, float("-inf"))

    def _shared(self, x, q):
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_a_backend_is_one_class_and_one_entry_and_serves_every_kind_of_row(monkeypatch, mode):
    formula = Formula()
    monkeypatch.setitem(backends.KERNELS, formula.name, formula)
    backends.resolve.cache_clear()
    problem = make_problem([90, 1, 7, 130], mode=mode, mask_rate=0.4, seed=int(torch.randint(99, ()).item()))
    expected = problem.dense_rows()
    found = problem.packed(packed_attention, backend=formula.name)
    assert max(relative_errors(found, expected)) < 1e-12
    assert formula.calls
    with pytest.raises(
        ValueError, match="attention backend 'formula' takes float64 only; use one of: cpu-flash"
    ):
        problem.to(torch.float32).packed(packed_attention, backend=formula.name)
    monkeypatch.undo()
    backends.resolve.cache_clear()
    with pytest.raises(ValueError, match="unknown attention backend 'formula'"):
        problem.packed(packed_attention, backend=formula.name)


def test_a_recipe_may_name_every_backend_that_there_is():
    named = get_args(ModelSpec.model_fields["attention_backend"].annotation)
    assert set(named) == {"auto", *backends.KERNELS, "triton", "oracle"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash-attn", "aten-cuda", "flash-attn-3", "flash-attn-4", "triton"])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((3, 3), 128)])
@pytest.mark.parametrize(
    ("mask_rate", "spans"), [(0.0, None), (0.15, None), (0.6, None), (0.6, "run"), (0.6, "document")]
)
def test_cuda_kernels_agree_with_the_oracle(name, heads, head_dim, mask_rate, spans):
    device = torch.device("cuda")
    try:
        backends.resolve(name, torch.bfloat16, head_dim, device)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    shape = {"mask_rate": mask_rate, "heads": heads, "head_dim": head_dim, "spans": spans}
    problem = make_problem([300, 1, 77, 513], **shape).to(torch.bfloat16)
    expected = problem.dense_rows()

    def attend(q, k, v, cos, sin, plan):
        moved = [x.to(device) for x in (q, k, v, cos, sin)]
        return packed_attention(*moved, plan.to(device), backend=name).cpu()

    assert max(relative_errors(problem.packed(attend), expected)) < 3e-2
