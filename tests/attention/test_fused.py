"""The fused CPU kernel against the formula: every shape, both dtypes and modes, and independence of the thread count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bico_ds.attention import backends
from bico_ds.attention.fused import fused_refusal
from bico_ds.attention.packed import packed_attention
from bico_ds.native import library
from tests.attention.attention_problems import Problem, make_problem, relative_errors

pytestmark = pytest.mark.skipif(
    library.native_refusal() is not None, reason=f"the fused kernel {library.native_refusal()}"
)


TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 2e-6}
# Some CPUs with AVX-512 have no products of bf16.
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            fused_refusal(dtype) is not None, reason=f"the fused kernel {fused_refusal(dtype)}"
        ),
    )
    for dtype in TOLERANCE
]


def errors(problem: Problem) -> list[float]:
    expected = problem.dense_rows()
    return relative_errors(problem.packed(packed_attention), expected, at_least=problem.rounding_sizes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@example(lengths=[1], mode="causal", mask_rate=0.0, heads=(6, 2), head_dim=128, spans=None, seed=0)
@example(
    lengths=[2, 1, 3, 2], mode="bidirectional", mask_rate=0.15, heads=(6, 2), head_dim=128, spans=None, seed=0
)
@example(
    lengths=[252, 12, 15, 14, 25],
    mode="bidirectional",
    mask_rate=0.0,
    heads=(6, 2),
    head_dim=8,
    spans=None,
    seed=752,
)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(120, 300)), min_size=1, max_size=5),
    mode=st.sampled_from(["bidirectional", "causal"]),
    mask_rate=st.sampled_from([0.0, 0.15, 0.9]),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (8, 1)]),
    head_dim=st.sampled_from([8, 24, 64, 128]),
    spans=st.sampled_from([None, "run", "document"]),
    seed=st.integers(0, 2**31),
)
def test_fused_kernel_equals_the_formula(dtype, lengths, mode, mask_rate, heads, head_dim, spans, seed):
    shape = {"heads": heads, "head_dim": head_dim, "spans": spans}
    problem = make_problem(lengths, mode=mode, mask_rate=mask_rate, seed=seed, **shape)
    problem = problem.to(dtype)
    assert backends.resolve("auto", dtype, head_dim, torch.device("cpu")).policy.fused
    assert max(errors(problem)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("length", [511, 512, 513, 1200])
def test_documents_of_several_key_chunks_equal_the_formula(dtype, mode, length):
    problem = make_problem([length, 3], mode=mode, mask_rate=0.3, heads=(3, 1), head_dim=16, seed=length)
    problem = problem.to(dtype)
    assert max(errors(problem)) < TOLERANCE[dtype]


def test_scores_that_grow_from_chunk_to_chunk_do_not_overflow():
    problem = make_problem([1100], mask_rate=0.2, heads=(2, 1), head_dim=8, seed=9)
    problem.k.mul_(torch.linspace(0.1, 30, len(problem.k))[:, None, None])
    problem = problem.to(torch.float32)
    found = problem.packed(packed_attention)
    # A score of about 150 is known to 150 times fp32's 6e-8, whatever computes it.
    assert max(relative_errors(found, problem.dense_rows())) < 1e-5


def test_result_does_not_depend_on_the_thread_count():
    problem = make_problem([70, 33, 1, 90], mask_rate=0.3, heads=(6, 2), head_dim=64, seed=4).to(
        torch.bfloat16
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(problem.packed(packed_attention))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_machine_without_a_compiler_is_told_so_and_still_served(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    library.native_refusal.cache_clear()
    backends.resolve.cache_clear()
    try:
        with caplog.at_level("INFO", logger=backends.__name__):
            backend = backends.resolve("auto", torch.bfloat16, 64, torch.device("cpu"))
        assert not backend.policy.fused
        assert "needs a C++ compiler" in caplog.text
    finally:
        library.native_refusal.cache_clear()
        backends.resolve.cache_clear()


def test_a_failed_build_names_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.native_refusal.cache_clear()
    try:
        assert "could not be built or loaded with /bin/false" in library.native_refusal()
    finally:
        library.native_refusal.cache_clear()


ON_THIS_CPU = """
import sys, torch
from tests.attention.attention_problems import make_problem, relative_errors
from bico_ds.attention import backends
from bico_ds.attention.packed import packed_attention
problem = make_problem([70, 1, 33], mask_rate=0.3, seed=3).to(torch.bfloat16)
found = problem.packed(packed_attention)
print(backends.resolve("auto", torch.bfloat16, 16, torch.device("cpu")).policy.fused)
print(backends.resolve("auto", torch.float32, 16, torch.device("cpu")).policy.fused)
print(max(relative_errors(found, problem.dense_rows())))
"""


def test_a_cpu_without_bf16_products_serves_bf16_by_other_kernels(request):
    """Skylake, Cascade Lake and Ice Lake have AVX-512, but no bf16."""
    answer = subprocess.run(
        [sys.executable, "-c", ON_THIS_CPU],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    bf16_is_fused, fp32_is_fused, error = answer.stdout.split()
    assert (bf16_is_fused, fp32_is_fused) == ("False", "True")
    assert float(error) < TOLERANCE[torch.bfloat16]
