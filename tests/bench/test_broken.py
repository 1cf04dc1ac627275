"""The ablations of `tools/bench/cures.py`: each leaves out one point of BICO and nothing else, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from tests import ROOT

NO_FLIP = """
import torch
from bico_ds.attention.packed import packed_attention
from bico_ds.attention.plan import build_plan
from bico_ds.attention.rotation import rotate_forward
from tools.bench.broken import no_flip

torch.manual_seed({seed})
T, H, D = 23, 2, 16
q, k, v = torch.randn(3, T, H, D)
angle = torch.arange(T)[:, None] * torch.tensor([0.7, 0.1, 0.05, 0.02] * 2).repeat(2)
cos, sin = angle.cos(), angle.sin()
for mode in ("bidirectional", "causal"):
    plan = build_plan(mode, kept_lengths=[T])
    found = packed_attention(q, k, v, cos, sin, plan, scale=0.3)
    scores = torch.einsum("ihd,jhd->hij", *(rotate_forward(x, cos[:, None], sin[:, None]) for x in (q, k))) * 0.3
    if mode == "causal":
        scores += torch.full((T, T), float("-inf")).triu(1)
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    print((found - expected).abs().max().item())
"""


def _printed(script: str) -> list[float]:
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return [float(line) for line in run.stdout.split()]


def test_without_the_flip_every_key_is_met_with_the_forward_rotation():
    seed = int(np.random.default_rng().integers(2**31))
    assert max(_printed(NO_FLIP.format(seed=seed))) < 1e-5
