"""Choice of backend: what `auto` takes and says, and one clear line where a backend cannot run."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from attention_problems import make_problem, relative_errors

from bico_ds.attention import backends
from bico_ds.attention.packed import packed_attention

CPU = torch.device("cpu")


def test_auto_on_cpu_takes_the_cpu_kernel_and_says_so_once(caplog):
    backends.resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            engine = backends.resolve("auto", torch.float32, 64, CPU)
    assert engine.kernel.name == "cpu-flash"
    assert len(caplog.records) == 1
    assert "cpu-flash for cpu, float32" in caplog.text


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "aten-cuda"])
def test_a_backend_that_cannot_run_says_why_and_what_would(name):
    with pytest.raises(ValueError, match=f"'{name}' .*use one of: cpu-flash") as error:
        backends.resolve(name, torch.bfloat16, 64, CPU)
    assert "\n" not in str(error.value)


def test_auto_serves_what_no_cuda_kernel_takes_by_tiles_alone_and_warns(caplog):
    backends.resolve.cache_clear()
    with caplog.at_level(logging.WARNING, logger=backends.__name__):
        engine = backends.resolve("auto", torch.float32, 64, torch.device("cuda"))
    assert engine.policy.flash_from == math.inf
    assert "dense tiles" in caplog.text
    assert "takes float16 or bfloat16, not float32" in caplog.text


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown attention backend 'flsh': choose one of auto, flash-attn"):
        packed_attention_of_anything("flsh")


def test_oracle_is_no_kernel():
    assert backends.resolve("oracle", torch.float32, 64, CPU) is None


def packed_attention_of_anything(backend):
    problem = make_problem([4], mask_rate=0.0)
    return problem.packed(packed_attention, backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash-attn", "aten-cuda", "flash-attn-4"])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((3, 3), 128)])
@pytest.mark.parametrize("mask_rate", [0.0, 0.15, 0.6])
def test_cuda_kernels_agree_with_the_oracle(name, heads, head_dim, mask_rate):
    device = torch.device("cuda")
    refusal = backends.KERNELS[name].refusal(torch.bfloat16, head_dim, device)
    if refusal:
        pytest.skip(f"{name} {refusal}")
    problem = make_problem([300, 1, 77, 513], mask_rate=mask_rate, heads=heads, head_dim=head_dim).to(
        torch.bfloat16
    )
    expected = [x[problem.token_of_row] for x in problem.dense()]

    def attend(q, k, v, cos, sin, plan):
        moved = [x.to(device) for x in (q, k, v, cos, sin)]
        return packed_attention(*moved, plan.to(device), backend=name).cpu()

    assert max(relative_errors(problem.packed(attend), expected)) < 3e-2
