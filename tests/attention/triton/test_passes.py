"""The kernels around the flash passes, in Triton's interpreter, against the formula; and what they state on meta."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.attention.backend import Backend
from bico_ds.attention.kernels.aten_cuda import AtenCuda
from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.attention.packed import run_packed_attention
from bico_ds.attention.plan import build_plan
from bico_ds.attention.triton.passes import TRITON_PASSES
from bico_ds.attention.triton.tilings import tiling_of
from bico_ds.common.traffic import counting_traffic
from tests.attention.attention_problems import make_problem, relative_errors
from tests.attention.triton.interpreter import (
    attend_by_passes,
    attend_by_wrong_passes,
    interpreted,
    needs_triton,
    objections,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}
BLOCKS = tiling_of(None, 16).blocks
# All rows in place; live rows by blocks; some documents by blocks alone; live rows as hidden keys of wider heads.
POLICIES = {
    "live rows in blocks": LayoutPolicy(flash_from=1, tile_scores=0, tile_min_rows=0, blocks=BLOCKS),
    "documents of both": LayoutPolicy(flash_from=12, tile_scores=0, tile_min_rows=0, blocks=BLOCKS),
    "hidden keys": LayoutPolicy(
        flash_from=5, tile_scores=50, tile_min_rows=4, tile_cost=1e9, hidden_cost=0.1
    ),
    "tiles": LayoutPolicy(flash_from=12, tile_scores=50, tile_min_rows=4),
}


def worst(found, problem) -> float:
    return max(relative_errors(found, problem.dense_rows(), at_least=problem.rounding_sizes()))


def check(policy: str, dtype=torch.float32, *, masks_keys=False, **shape) -> None:
    problem = make_problem(**shape).to(dtype)
    found = interpreted(partial(attend_by_passes, masks_keys=masks_keys), POLICIES[policy], problem)
    assert worst(found, problem) < TOLERANCE[dtype]


PROBLEMS = {
    "policy": st.sampled_from(list(POLICIES)),
    "mode": st.sampled_from(["bidirectional", "bidirectional", "causal"]),
    "mask_rate": st.sampled_from([0.0, 0.15, 0.6]),
    "heads": st.sampled_from([(1, 1), (3, 3), (4, 2), (3, 1)]),
    "head_dim": st.sampled_from([8, 24, 64]),
    "rotary_factor": st.sampled_from([1.0, 1.3]),
    "dtype": st.sampled_from(list(TOLERANCE)),
    "spans": st.sampled_from([None, "run", "document"]),
    "seed": st.integers(0, 2**31),
}


@needs_triton
@settings(max_examples=5, deadline=None)
@given(**PROBLEMS, lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_two_passes_within_triton_kernels_equal_the_formula(policy, dtype, **problem):
    check(policy, dtype, **problem)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=80, deadline=None)
@given(**PROBLEMS, lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5))
def test_two_passes_within_triton_kernels_equal_the_formula_on_many_problems(policy, dtype, **problem):
    check(policy, dtype, **problem)


@needs_triton
@pytest.mark.parametrize("masks_keys", [False, True], ids=["a wider head", "a key mask"])
def test_hidden_keys_weigh_nothing_whichever_way_they_are_hidden(masks_keys):
    check("hidden keys", masks_keys=masks_keys, lengths=[40, 1, 23], mask_rate=0.6, seed=15)


@needs_triton
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_a_batch_without_live_rows_is_served_in_place(mode):
    shape = {"lengths": [33, 1, 64, 2], "mask_rate": 0.0, "head_dim": 128, "rotary_factor": 1.3}
    check("live rows in blocks", mode=mode, seed=3, **shape)


@needs_triton
def test_no_bit_changes_with_another_document():
    problem = make_problem([20, 9, 37], mask_rate=0.4, seed=5, heads=(2, 1)).to(torch.float16)
    attend = partial(interpreted, attend_by_passes, POLICIES["live rows in blocks"])
    before = attend(problem)
    for changed in range(3):
        factor = 1 + 0.5 * (problem.document == changed)[:, None, None].half()
        after = attend(replace(problem, **{x: getattr(problem, x) * factor for x in ("q", "k", "v")}))
        inside = problem.document[problem.token_of_row] == changed
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[~inside], b[~inside])
            assert not torch.equal(a[inside], b[inside])


MUTATIONS = {
    "the second pass rotated forward": ("rotate(x1, x2, c, -s)", "rotate(x1, x2, c, s)"),
    "keys at the places of their queries": (
        "place, flipped = _places(PLACES, rows, there, 1)\n        sources",
        "place, flipped = _places(PLACES, rows, there, 0)\n        sources",
    ),
    "the first pass weighed as the second": ("exp2(-distance * LOG2E)", "exp2(distance * LOG2E)"),
    "the lse of the first pass alone": ("lse += tl.where(flipped, grown, 0.0)", "lse += 0.0 * grown"),
    "the second gradient turned back like the first": (
        "rotate(g1.to(tl.float32), g2.to(tl.float32), c, s)",
        "rotate(g1.to(tl.float32), g2.to(tl.float32), c, -s)",
    ),
    "gradients of keys that replace others": ("x1 + old1.to(tl.float32)", "x1"),
    "gradients of values that replace others": (
        "x += load_rows(DV, to, there, D, HALF).to(tl.float32)",
        "x += 0.0",
    ),
    "flipped gradients of out that are not flipped": (
        "to = (place * H + head) * WIDTH\n        store_rows(GRAD2",
        "to = ((num_flipped - 1 - place) * H + head) * WIDTH\n        store_rows(GRAD2",
    ),
}


@needs_triton
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_does_not_equal_the_formula(mutation):
    shape = {"lengths": [33, 20], "mask_rate": 0.5, "heads": (2, 1), "rotary_factor": 1.3, "seed": 6}
    problem = make_problem(**shape).to(torch.float32)
    policy = POLICIES["live rows in blocks"]
    found = interpreted(attend_by_wrong_passes, *MUTATIONS[mutation], policy, problem)
    assert not worst(found, problem) < 100 * TOLERANCE[torch.float32]


@needs_triton
def test_the_self_check_finds_right_kernels_right():
    assert interpreted(objections) == [None, None]


@needs_triton
@pytest.mark.parametrize(
    ("number", "mutation"),
    [
        (0, ("forward", "there, scale, True", "there, scale, False")),
        pytest.param(0, ("backward", "a1, a2 = turn(a1, a2, c, s)\n        _", "_"), marks=pytest.mark.slow),
        pytest.param(
            1, ("pass_kernels", "rotate(x1, x2, c, -s)", "rotate(x1, x2, c, s)"), marks=pytest.mark.slow
        ),
        (1, ("pass_kernels", "lse += tl.where(flipped, grown, 0.0)", "lse += 0.0 * grown")),
        pytest.param(
            1,
            ("pass_kernels", "sources = tl.load(ROWS + rows, mask=there, other=0)", "sources = rows"),
            marks=pytest.mark.slow,
        ),
        pytest.param(1, ("pass_kernels", "* key_hider", "* 0.0"), marks=pytest.mark.slow),
    ],
    ids=["forward", "backward", "rotation", "lse", "table of rows", "hidden keys"],
)
def test_the_self_check_finds_a_wrong_kernel_and_says_where(number, mutation):
    found = interpreted(objections, *mutation)
    assert found[number].startswith("is wrong on this GPU (bidirectional ")
    assert found[1 - number] is None


@needs_triton
def test_a_kernel_that_cannot_be_compiled_is_an_objection_and_no_crash():
    found = interpreted(objections, "pass_kernels", "grown, 0.0)", "grown, no_such_name)")
    assert found[1].startswith("fails on this GPU (")


H, N, D = 8, 2, 64
META = torch.device("meta")


def on_meta(plan, policy):
    """Runs one batch on the meta device, in bf16."""
    backend = Backend(kernel=AtenCuda(), policy=policy, passes=TRITON_PASSES)
    make = partial(torch.empty, dtype=torch.bfloat16, device=META)
    q, k, v = (make(plan.num_rows, heads, D, requires_grad=True) for heads in (H, N, N))
    tables = make(plan.num_rows, D), make(plan.num_rows, D)
    layout = build_layout(plan, policy).to(META)
    out = run_packed_attention(q, k, v, *tables, plan.to(META), scale=0.1, backend=backend, layout=layout)
    return out, *torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def test_the_traffic_of_two_passes_is_that_of_a_sum_by_hand():
    """50 kept rows of two documents, 48 of them flipped; 8 query and 2 key heads of 64; bf16.

    Bytes: q, out, grad, dq 51,200 each, flipped 49,152; k, v, dk, dv 12,800 each, flipped 12,288; halves of cos and sin
    6,400 together; lse 1,600, flipped 1,536; places 200.
    """
    plan = build_plan("bidirectional", kept_lengths=[30, 20])
    with counting_traffic() as calls:
        out, *grads = on_meta(plan, POLICIES["live rows in blocks"])
    assert [(x.shape, x.dtype) for x in (out, *grads)] == [
        ((50, heads, D), torch.bfloat16) for heads in (H, H, N, N)
    ]
    rotated = (51_200 + 2 * 12_800 + 6_400 + 200, 51_200 + 12_800 + 49_152 + 2 * 12_288)
    merged = (2 * (49_152 + 1_536) + 200, 49_152 + 1_536)
    gathered = (2 * 51_200 + 1_600 + 200, 2 * 49_152 + 1_536)
    summed = (51_200 + 49_152 + 2 * (12_800 + 12_288) + 6_400 + 200, 51_200 + 2 * 12_800)
    expected = {"rotated": rotated, "merged": merged, "gathered": gathered, "summed": summed}
    order = ("rotated", "merged", "rotated", "gathered", "summed")
    assert [(c.op, c.launches, c.bytes_read, c.bytes_written) for c in calls] == [
        (f"passes {name}", 1, *expected[name]) for name in order
    ]


def test_a_causal_batch_is_rotated_and_rotated_back_and_nothing_else():
    with counting_traffic() as calls:
        on_meta(build_plan("causal", kept_lengths=[30, 20]), POLICIES["live rows in blocks"])
    assert [c.op for c in calls] == [f"passes {name}" for name in ("rotated", "rotated", "summed")]
