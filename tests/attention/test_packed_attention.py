"""The op against the paper's formula, and properties that a leak, a wrong sign or a wrong mask would break."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.attention import backends
from bico_ds.attention.backend import Backend
from bico_ds.attention.fused import fused_refusal
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.attention.packed import packed_attention, run_packed_attention
from bico_ds.attention.plan import build_plan
from tests.attention.attention_problems import NoKeyMask, make_problem, relative_errors, rotary_tables

# Small documents reach every path when the policy's thresholds are small. The fused kernel takes no fp64.
POLICIES = {
    "tiles": LayoutPolicy(flash_from=10**9, tile_scores=400, tile_min_rows=4),
    "flash": LayoutPolicy(flash_from=1, tile_scores=100, tile_min_rows=4),
    "mixed": LayoutPolicy(flash_from=12, tile_scores=50, tile_min_rows=4),
    "hidden": LayoutPolicy(flash_from=5, tile_scores=50, tile_min_rows=4, tile_cost=1e9, hidden_cost=0.1),
}
SPANS = [None, "run", "document"]
HALF_POLICIES = {**POLICIES, "fused": backends.CPU_FUSED_POLICY}


def through(policy_name):
    """The op with the thresholds of a named policy."""
    backend = Backend(kernel=CpuFlash(), policy=HALF_POLICIES[policy_name])

    def attend(q, k, v, cos, sin, plan):
        if policy_name == "fused" and (refusal := fused_refusal(q.dtype)):
            pytest.skip(f"the fused kernel {refusal}")
        return run_packed_attention(q, k, v, cos, sin, plan, scale=q.shape[-1] ** -0.5, backend=backend)

    return attend


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    mask_rate=st.sampled_from([0.0, 0.15, 0.4, 0.9]),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1)]),
    head_dim=st.sampled_from([8, 24, 64]),
    rotary_factor=st.sampled_from([1.0, 1.3]),
    spans=st.sampled_from(SPANS),
    seed=st.integers(0, 2**31),
)
def test_op_equals_the_formula_on_undropped_documents(
    policy, lengths, mask_rate, heads, head_dim, rotary_factor, spans, seed
):
    shape = {"heads": heads, "head_dim": head_dim, "rotary_factor": rotary_factor, "spans": spans}
    problem = make_problem(lengths, seed=seed, mask_rate=mask_rate, **shape)
    found = problem.packed(through(policy))
    assert max(relative_errors(found, problem.dense_rows())) < 1e-12


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("heads", "seed"), [((4, 2), 1), ((3, 3), 2)])
def test_causal_mode_equals_torch_causal_attention(policy, heads, seed):
    lengths = [17, 1, 30, 5, 2]
    problem = make_problem(lengths, mode="causal", heads=heads, seed=seed)
    found = problem.packed(through(policy))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        inputs = [x[rows].clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        cos, sin = problem.cos[rows, None], problem.sin[rows, None]
        half = cos.shape[-1] // 2
        turn = lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin  # noqa: B023, E731
        q, k, v = (x.transpose(0, 1) for x in (turn(inputs[0]), turn(inputs[1]), inputs[2]))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        expected = [out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out[rows])]
        assert max(relative_errors([x[rows] for x in found], expected)) < 1e-12
        start += length


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spans", SPANS)
def test_fp32_stays_within_two_millionths(policy, spans):
    shape = {"mask_rate": 0.3, "heads": (6, 2), "head_dim": 64, "spans": spans}
    problem = make_problem([70, 33, 1, 90], seed=3, **shape).to(torch.float32)
    assert max(relative_errors(problem.packed(through(policy)), problem.dense_rows())) < 2e-6


@pytest.mark.parametrize("policy", HALF_POLICIES)
@pytest.mark.parametrize("norm", [1.0, 6.0])
@pytest.mark.parametrize("spans", SPANS)
def test_bf16_error_is_that_of_dense_bf16(policy, norm, spans):
    """At norm 6 the scores reach ±300: the softmax is a maximum, which bf16 scores of a dense op lose, too."""
    shape = {"mask_rate": 0.3, "heads": (6, 2), "head_dim": 64, "spans": spans}
    problem = make_problem([70, 33, 1, 90], seed=4, **shape)
    problem = type(problem)(**{**problem.__dict__, "q": problem.q * norm, "k": problem.k * norm}).to(
        torch.bfloat16
    )
    expected = problem.dense_rows()
    ours = mean_errors(problem.packed(through(policy)), expected)
    dense = mean_errors(problem.packed(dense_in_dtype), expected)
    assert all(our <= 1.3 * other + 1e-4 for our, other in zip(ours, dense, strict=True)), (ours, dense)


def mean_errors(found, expected):
    return [float((a.double() - b.double()).abs().mean()) for a, b in zip(found, expected, strict=True)]


def dense_in_dtype(q, k, v, cos, sin, plan):
    """What an ordinary model computes: all in q's dtype, the softmax in fp32, one score matrix per rotation."""
    kept = plan.cu_seqlens.diff().long()
    document = torch.cat([torch.repeat_interleave(kept), plan.live_document])
    rank = torch.arange(plan.num_kept) - plan.cu_seqlens.long()[document[: plan.num_kept]]
    split = torch.cat([rank + 1, plan.live_split])
    group, half = q.shape[1] // k.shape[1], q.shape[2] // 2
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    turn = lambda x, s: x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * s[:, None]  # noqa: E731
    scores = [torch.einsum("mhd,nhd->hmn", turn(q, s), turn(k, s)) * q.shape[2] ** -0.5 for s in (sin, -sin)]
    row, kept_keys = torch.arange(plan.num_rows), slice(0, plan.num_kept)
    forward = row[None, :] <= row[:, None]  # of keys in spans
    forward[:, kept_keys] = rank[None, :] < split[:, None]
    visible = torch.zeros_like(forward)
    visible[:, kept_keys] = document[None, kept_keys] == document[:, None]
    if plan.span_cu_seqlens is not None:
        span = torch.repeat_interleave(plan.span_cu_seqlens.diff().long())
        visible[plan.num_kept :, plan.num_kept :] = (span[None, :] == span[:, None]).tril()
    blended = torch.where(forward, *scores).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(blended, -1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("hmn,nhd->mhd", weights, v)


@pytest.mark.parametrize("policy", HALF_POLICIES)
def test_changing_one_document_changes_no_bit_of_another(policy):
    problem = make_problem([20, 9, 31, 14], mask_rate=0.4, seed=5).to(torch.bfloat16)
    for changed in range(4):
        other = perturbed(problem, problem.document == changed)
        before, after = problem.packed(through(policy)), other.packed(through(policy))
        elsewhere = problem.document[problem.token_of_row] != changed
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[elsewhere], b[elsewhere])
            assert not torch.equal(a[~elsewhere], b[~elsewhere])


@pytest.mark.parametrize("policy", HALF_POLICIES)
def test_a_placeholder_is_seen_by_no_row_but_its_own(policy):
    problem = make_problem([20, 9, 31], mask_rate=0.5, seed=6).to(torch.bfloat16)
    live = torch.zeros(problem.document.numel(), dtype=torch.bool)
    live[problem.token_of_row[problem.plan.num_kept :]] = True
    assert live.any()
    before = problem.packed(through(policy))
    after = perturbed(problem, live).packed(through(policy))
    kept = slice(0, problem.plan.num_kept)
    assert torch.equal(before[0][kept], after[0][kept])
    assert not torch.equal(before[0][problem.plan.num_kept :], after[0][problem.plan.num_kept :])
    for grad in before[2:]:
        assert (grad[problem.plan.num_kept :] == 0).all(), "k and v of live rows must get exactly no gradient"


@pytest.mark.parametrize("policy", HALF_POLICIES)
def test_keys_and_values_of_live_rows_are_never_read(policy):
    problem = make_problem([20, 9, 31], mask_rate=0.5, seed=7).to(torch.bfloat16)
    live = problem.token_of_row[problem.plan.num_kept :]
    poisoned = type(problem)(**{**problem.__dict__, "k": problem.k.clone(), "v": problem.v.clone()})
    poisoned.k[live] = torch.nan
    poisoned.v[live] = torch.inf
    for a, b in zip(problem.packed(through(policy)), poisoned.packed(through(policy)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", HALF_POLICIES)
@pytest.mark.parametrize("spans", ["run", "document"])
def test_a_row_of_a_span_is_seen_by_itself_and_the_later_rows_of_its_span_alone(policy, spans):
    shape = {"mask_rate": 0.6, "spans": spans}
    problem = make_problem([17, 9], seed=int(torch.randint(2**31, ())), **shape).to(torch.float32)
    before = problem.packed(through(policy))[0]
    live = problem.token_of_row[problem.plan.num_kept :]
    for token in live.tolist():
        changed = torch.zeros(len(problem.q), dtype=torch.bool)
        changed[token] = True
        after = perturbed(problem, changed, ("k", "v")).packed(through(policy))[0]
        differs = (before != after).flatten(1).any(1)
        sees = (problem.span == problem.span[token]) & (torch.arange(len(problem.q)) >= token)
        assert differs.tolist() == sees[problem.token_of_row].tolist()


@pytest.mark.parametrize("policy", HALF_POLICIES)
def test_spans_of_one_row_each_see_but_themselves(policy):
    mask = np.tile([False, True, True, False, False], 6)  # the first of two masked tokens is a live row
    problem = make_problem([10, 20], mask=mask, heads=(4, 2), rotary_factor=1.3, spans="run", seed=18)
    assert problem.plan.span_cu_seqlens.diff().tolist() == [1] * 6
    problem = problem.to(torch.float32)
    assert max(relative_errors(problem.packed(through(policy)), problem.dense_rows())) < 2e-6


@pytest.mark.parametrize("policy", HALF_POLICIES)
def test_spans_change_nothing_where_no_row_is_live(policy):
    problem = make_problem([20, 1, 30], mask_rate=0.0, seed=19, spans="run").to(torch.float32)
    plain = replace(problem, plan=build_plan("bidirectional", kept_lengths=[20, 1, 30]))
    for a, b in zip(problem.packed(through(policy)), plain.packed(through(policy)), strict=True):
        assert torch.equal(a, b)


def perturbed(problem, tokens, names=("q", "k", "v")):
    random = torch.Generator().manual_seed(0)
    noise = lambda x: x + tokens[:, None, None] * torch.randn(x.shape, generator=random).to(x.dtype)  # noqa: E731
    changed = {name: noise(getattr(problem, name)) for name in names}
    return type(problem)(**{**problem.__dict__, **changed})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_mirrored_sequence_gives_the_mirrored_result(policy):
    """Only if both directions rotate by opposite angles can the outputs agree.

    Reversal maps n <= m to n >= m, and the reversed rotation at mirrored positions is the forward one.
    """
    problem = make_problem([25], mask_rate=0.0, seed=8)
    cos, sin = rotary_tables(np.arange(25), 16)
    mirrored = type(problem)(
        **{**problem.__dict__, **{n: getattr(problem, n).flip(0) for n in ("q", "k", "v", "grad_out")}}
    )
    for a, b in zip(problem.packed(through(policy)), mirrored.packed(through(policy)), strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(problem.cos, cos)
    assert torch.equal(problem.sin, sin)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_past_and_the_future_at_equal_distance_look_alike(policy):
    """One query between two equal keys: the reversed rotation scores the later one as if it were before the query."""
    random = torch.Generator().manual_seed(9)
    q = torch.randn(3, 1, 16, generator=random, dtype=torch.float64)
    k = torch.randn(1, 1, 16, generator=random, dtype=torch.float64).expand(3, 1, 16).contiguous()
    v = torch.eye(16, dtype=torch.float64)[:3, None, :].contiguous()
    cos, sin = rotary_tables([0, 7, 14], 16)
    plan = build_plan("bidirectional", kept_lengths=[3])
    out = through(policy)(q, k, v, cos, sin, plan)
    torch.testing.assert_close(out[1, 0, 0], out[1, 0, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_only_relative_positions_matter(policy):
    plain, shifted = (make_problem([20, 31], mask_rate=0.4, seed=10, position_shift=s) for s in (0, 1000))
    for a, b in zip(plain.packed(through(policy)), shifted.packed(through(policy)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bidirectional_differs_from_causal():
    problem = make_problem([20], mask_rate=0.0, seed=11)
    rows = (problem.q, problem.k, problem.v, problem.cos, problem.sin)
    causal = packed_attention(*rows, build_plan("causal", kept_lengths=[20]))
    both = packed_attention(*rows, problem.plan)
    torch.testing.assert_close(causal[-1], both[-1])
    assert (causal[:-1] - both[:-1]).abs().amax((1, 2)).min() > 1e-3


def test_scale_is_used_in_forward_and_backward():
    problem = make_problem([20, 40], mask_rate=0.3, seed=12)
    scaled = type(problem)(**{**problem.__dict__, "q": problem.q * 0.5})
    halved = scaled.packed(packed_attention, scale=0.25)
    found = problem.packed(packed_attention, scale=0.125)
    assert max(relative_errors([found[0], found[1] * 2, *found[2:]], halved)) < 1e-12


def test_the_default_backend_covers_documents_around_its_thresholds():
    policy = backends.CPU_POLICY
    lengths = [policy.flash_from + 40, 3, policy.flash_from - 1, 1]
    problem = make_problem(lengths, mask_rate=0.2, heads=(2, 1), head_dim=8, seed=13)
    assert max(relative_errors(problem.packed(packed_attention), problem.dense_rows())) < 1e-12


@pytest.mark.parametrize("spans", SPANS)
def test_the_oracle_backend_agrees(spans):
    problem = make_problem([20, 1, 9], mask_rate=0.4, seed=14, spans=spans)
    found = problem.packed(packed_attention, backend="oracle")
    assert max(relative_errors(found, problem.dense_rows())) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(q=x["q"][1:]), "q has 19 rows, the plan 20"),
        (lambda x: x.update(v=x["v"][:, :1]), "do not fit q"),
        (
            lambda x: x.update(k=x["k"][:, [0, 0, 0]], v=x["v"][:, [0, 0, 0]]),
            "4 query heads are no multiple of 3",
        ),
        (lambda x: x.update(cos=x["cos"][:, :8]), "must be \\(20, 16\\)"),
        (lambda x: x.update(k=x["k"].float()), "must share one dtype"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    problem = make_problem([20], mask_rate=0.0)
    arguments = {name: getattr(problem, name) for name in ("q", "k", "v", "cos", "sin", "plan")}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


def test_tiles_that_keep_no_masks_compute_the_same(monkeypatch):
    monkeypatch.setattr("bico_ds.attention.tiles._KEPT_SCORES", 0)
    problem = make_problem([40, 1, 23], mask_rate=0.5, seed=16, spans="document")
    assert max(relative_errors(problem.packed(through("tiles")), problem.dense_rows())) < 1e-12


@pytest.mark.parametrize("mask_rate", [0.15, 0.6])
@pytest.mark.parametrize("spans", SPANS)
def test_hidden_keys_weigh_nothing_in_a_kernel_without_key_mask(mask_rate, spans):
    backend = Backend(kernel=NoKeyMask(), policy=POLICIES["hidden"])
    problem = make_problem([40, 1, 23, 60], mask_rate=mask_rate, seed=15, spans=spans)
    found = problem.packed(partial(run_packed_attention, scale=0.25, backend=backend))
    assert max(relative_errors(found, problem.dense_rows())) < 1e-12


def test_a_gradient_of_nan_is_the_largest_error_of_all():
    right, wrong = torch.ones(3, 2, 8), torch.full((3, 2, 8), torch.nan)
    assert max(relative_errors([right, wrong], [right, right])) == float("inf")
