"""The Triton kernels in Triton's interpreter against the formula, and properties that a leak or a wrong index would break.

In fp32 and fp16: the interpreter has no bf16. In it a block holds 32 rows or keys, and a tile 16 of the others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.attention.triton.tilings import tiling_of
from tests.attention.attention_problems import Problem, make_problem, relative_errors
from tests.attention.triton.interpreter import (
    attend,
    attend_by,
    attend_by_mutant,
    attend_far_apart,
    attend_from_one_projection,
    attend_scaled,
    interpreted,
    needs_triton,
)

pytestmark = needs_triton

BLOCKS = tiling_of(None, 16).blocks
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def errors(found: list[torch.Tensor], problem: Problem) -> list[float]:
    return relative_errors(found, problem.dense_rows(), at_least=problem.rounding_sizes())


def check(*, dtype=torch.float32, **shape) -> None:
    problem = make_problem(**shape).to(dtype)
    assert max(errors(interpreted(attend, problem), problem)) < TOLERANCE[dtype]


PROBLEMS = {
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=4),
    "mode": st.sampled_from(["bidirectional", "causal"]),
    "mask_rate": st.sampled_from([0.0, 0.15, 0.6]),
    "heads": st.sampled_from([(1, 1), (3, 3), (4, 2), (3, 1)]),
    "head_dim": st.sampled_from([8, 24, 64]),
    "rotary_factor": st.sampled_from([1.0, 1.3]),
    "dtype": st.sampled_from(list(TOLERANCE)),
    "spans": st.sampled_from([None, "run", "document"]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=8, deadline=None)
@given(**PROBLEMS)
def test_the_kernels_equal_the_formula(**problem):
    check(**problem)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=80, deadline=None)
@given(**{**PROBLEMS, "lengths": st.lists(st.integers(1, 130), min_size=1, max_size=5)})
def test_the_kernels_equal_the_formula_on_many_problems(**problem):
    check(**problem)


@pytest.mark.parametrize(
    ("head_dim", "heads", "mode", "dtype"),
    [
        (16, (3, 3), "bidirectional", torch.float32),
        (64, (4, 2), "bidirectional", torch.float16),
        (96, (2, 1), "bidirectional", torch.float32),
        (128, (3, 1), "bidirectional", torch.float32),
        (128, (2, 1), "causal", torch.float16),
        (256, (1, 1), "bidirectional", torch.float32),
    ],
)
def test_every_class_of_head_dimension_is_served(head_dim, heads, mode, dtype):
    shape = {"lengths": [40, 3], "mask_rate": 0.4, "rotary_factor": 1.3, "seed": head_dim}
    check(head_dim=head_dim, heads=heads, mode=mode, dtype=dtype, **shape)


@pytest.mark.parametrize("mask_rate", [0.0, 0.15, 0.6])
def test_documents_of_about_a_block_are_served_whole(mask_rate):
    check(lengths=[31, 1, 32, 33, 65], mask_rate=mask_rate, heads=(2, 1), head_dim=16, seed=1)


def test_documents_of_about_a_block_are_served_whole_in_causal_mode():
    check(lengths=[31, 1, 32, 33, 65], mode="causal", heads=(2, 1), head_dim=16, seed=2)


def test_scores_that_grow_from_tile_to_tile_do_not_overflow():
    problem = make_problem([70], mask_rate=0.2, heads=(2, 1), head_dim=8, seed=9)
    problem.k.mul_(torch.linspace(0.1, 30, len(problem.k))[:, None, None])
    problem = problem.to(torch.float32)
    # A score of about 150 is known to 150 times fp32's 6e-8, whatever computes it.
    assert max(relative_errors(interpreted(attend, problem), problem.dense_rows())) < 1e-5


def test_scores_far_below_zero_weigh_against_each_other_and_not_against_absent_keys():
    """Of all keys, so that a softmax which began with a score of 0, or counted a key behind the end, would know no other."""
    problem = make_problem([20], mask_rate=0.2, heads=(2, 1), head_dim=8, seed=8)
    unturned = {"cos": torch.ones_like(problem.cos), "sin": torch.zeros_like(problem.sin)}
    far = {"q": problem.q.abs() + 1, "k": -150 * (problem.k.abs() + 1)}
    problem = replace(problem, **far, **unturned).to(torch.float32)
    found = interpreted(attend, problem)
    assert max(relative_errors(found, problem.dense_rows(), at_least=problem.rounding_sizes())) < 1e-4


def test_a_scale_that_is_given_is_used_in_forward_and_backward():
    problem = make_problem([20, 3], mask_rate=0.3, heads=(2, 1), head_dim=16, seed=12).to(torch.float32)
    halved = replace(problem, q=problem.q * 0.5).dense_rows()  # by the scale 1/4 of head dimension 16
    found = interpreted(attend_scaled, problem, 0.125)
    assert max(relative_errors([found[0], found[1] * 2, *found[2:]], halved)) < 3e-6


def test_changing_one_document_changes_no_bit_of_another_and_a_repetition_changes_none():
    problem = make_problem([20, 9, 37], mask_rate=0.4, seed=5, heads=(2, 1)).to(torch.float16)
    before, again = interpreted(attend, problem), interpreted(attend, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    for changed in range(3):
        factor = 1 + 0.5 * (problem.document == changed)[:, None, None].half()
        grown = {name: getattr(problem, name) * factor for name in ("q", "k", "v")}
        after = interpreted(attend, replace(problem, **grown))
        inside = problem.document[problem.token_of_row] == changed
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[~inside], b[~inside])
            assert not torch.equal(a[inside], b[inside])


def test_keys_and_values_of_live_rows_are_never_read_and_get_no_gradient():
    problem = make_problem([20, 9, 37], mask_rate=0.5, seed=7, heads=(2, 1)).to(torch.float16)
    live = problem.token_of_row[problem.plan.num_kept :]
    assert len(live)
    poisoned = replace(problem, k=problem.k.clone(), v=problem.v.clone())
    poisoned.k[live] = torch.nan
    poisoned.v[live] = torch.inf
    found, expected = interpreted(attend, poisoned), interpreted(attend, problem)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for grad in found[2:]:
        assert (grad[problem.plan.num_kept :] == 0).all()


MIXED = LayoutPolicy(
    flash_from=25, causal_flash_from=10, tile_scores=0, tile_min_rows=0, blocks=BLOCKS, hidden_cost=1.6
)


@pytest.mark.parametrize(
    ("mode", "tile_cost"), [("bidirectional", 0.0), ("bidirectional", 1e9), ("causal", 0.0)]
)
def test_flash_kernels_and_blocks_share_a_batch(mode, tile_cost):
    """Documents of either, and one whose kept rows are in the one and its live rows in the other: its dk and dv are sums."""
    policy = replace(MIXED, tile_cost=tile_cost)
    problem = make_problem([40, 1, 23, 60, 12], mask_rate=0.3, mode=mode, heads=(2, 1), seed=15)
    problem = problem.to(torch.float32)
    layout = build_layout(problem.plan, policy)
    in_blocks = set(layout.blocks.rows.tolist())
    live = set(range(problem.plan.num_kept, problem.plan.num_rows))
    assert layout.flash and not layout.tiles
    if mode == "bidirectional":
        assert any(group.hidden is not None for group in layout.flash) == (tile_cost > 0)
        assert (live <= in_blocks) == (tile_cost == 0)
    else:
        assert in_blocks == {40}
    assert max(errors(interpreted(attend_by, policy, problem), problem)) < TOLERANCE[torch.float32]


def test_slices_of_one_projection_and_expanded_gradients_are_read_where_they_are():
    problem = make_problem([20, 9], mask_rate=0.4, seed=3, heads=(3, 1)).to(torch.float32)
    seen = torch.zeros(len(problem.q), 1, 1)
    seen[problem.token_of_row] = 1.0
    given = problem.grad_out[:, :1, :1].expand_as(problem.q) * seen
    problem = replace(problem, grad_out=given)
    assert max(errors(interpreted(attend_from_one_projection, problem), problem)) < TOLERANCE[torch.float32]


def test_rows_beyond_2_to_the_31_elements_are_found():
    problem = make_problem([34], mask_rate=0.3, seed=4, heads=(1, 1)).to(torch.float16)
    found = interpreted(attend_far_apart, problem, 1 << 27)
    assert len(problem.token_of_row) << 27 > 2**31
    assert all(torch.equal(a, b) for a, b in zip(found, interpreted(attend, problem), strict=True))


TURN_OF_QUERIES = "a1, a2 = turn(a1, a2, c, s)\n        rows ="
TURN_OF_KEYS = "a1, a2 = turn(a1, a2, c, s)\n        _"
MUTATIONS = {
    "the reversed sine's sign": ("forward", "there, scale, True", "there, scale, False"),
    "keys rotated one way only": ("primitives", "1.0, direction == 1", "1.0, False"),
    "a split off by one": ("primitives", "key < split", "key <= split"),
    "a key of the neighbour document": ("forward", "there = j < keys", "there = j <= keys"),
    "a query of the neighbour document": (
        "backward",
        "BLOCK)\n        there = entries < end",
        # Of the last document none: what lies behind the table is no row, and may end the process.
        "BLOCK)\n        there = entries < tl.minimum(end + 1, num_entries)",
    ),
    "a live row used as a key": (
        "row_blocks",
        "keys = documents.key_counts[owner]\n",
        "keys = documents.key_counts[owner] + 1\n",
    ),
    "the turn of the queries left out": ("backward", TURN_OF_QUERIES, "rows ="),
    "the turn of the keys left out": ("backward", TURN_OF_KEYS, "_"),
    "a rotation of length 1 assumed": ("primitives", "length = c * c + s * s", "length = 1.0"),
    "a missing member of a group of heads": ("backward", "blocks * (H // N)", "blocks * (H // N - 1)"),
    "rows that begin a block too late": (
        "row_blocks",
        'owner * step + key, side="right"',
        'owner * step + key + 1, side="right"',
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_does_not_equal_the_formula(mutation):
    shape = {"lengths": [40, 20], "mask_rate": 0.4, "heads": (2, 1), "rotary_factor": 1.3, "seed": 6}
    problem = make_problem(**shape).to(torch.float32)
    found = interpreted(attend_by_mutant, *MUTATIONS[mutation], problem)
    assert not max(errors(found, problem)) < 100 * TOLERANCE[torch.float32]
