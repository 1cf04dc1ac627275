"""The layout: every row served once, bound to its policy and its batch, the same on every device and in every process."""

from __future__ import annotations

import pickle

import pytest
import torch

from bico_ds.attention import backends, tiles
from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.attention.packed import packed_attention
from bico_ds.attention.plan import build_plan
from tests.attention.attention_problems import make_problem

MIXED = LayoutPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)


def test_layout_covers_every_row_once():
    plan = build_plan(
        "bidirectional", kept_lengths=[5, 1, 30, 7, 60], live_document=[0, 2, 4, 4], live_split=[2, 30, 1, 60]
    )
    layout = build_layout(plan, MIXED)
    tiled = torch.cat([tile.query_slots for tile in layout.tiles])
    rows = torch.cat([tiled[tiled < plan.num_rows], layout.flash[0].query_rows])
    assert rows.sort().values.tolist() == list(range(plan.num_rows))
    assert layout.flash[0].plan.cu_seqlens.tolist() == [0, 30, 90]


def test_each_live_row_of_a_span_is_in_the_pass_of_spans_or_alone_once():
    problem = make_problem([50, 1, 20], mask_rate=0.6, spans="run", seed=25)
    lengths = problem.plan.span_cu_seqlens.diff()
    spans = build_layout(problem.plan, MIXED).spans
    rows = torch.cat([spans.rows, spans.lone]).sort().values
    assert rows.tolist() == list(range(problem.plan.num_kept, problem.plan.num_rows))
    assert spans.layout.outline.num_documents == (lengths > 1).sum() > 0
    assert spans.layout.outline.num_kept == lengths[lengths > 1].sum() == len(spans.rows)
    assert len(spans.lone) == (lengths == 1).sum() > 0


def test_short_spans_are_no_documents_of_a_flash_kernel_on_gpus():
    """Its backward kernel would have 128 rows of fp32 sums for each: gigabytes for a thousand spans."""
    live = {"live_document": [0] * 132, "live_split": [1] * 132}
    plan = build_plan("bidirectional", kept_lengths=[9], **live, live_spans=[2, 128, 2])
    layout = build_layout(plan, backends.CUDA_POLICY)
    assert layout.flash[0].plan.cu_seqlens.tolist() == [0, 9]
    assert layout.spans.layout.flash[0].plan.cu_seqlens.tolist() == [0, 128]
    assert sum(len(tile.query_rows) for tile in layout.spans.layout.tiles) == 4


def test_layout_survives_a_worker_process():
    live = {"live_document": [0, 0], "live_split": [2, 2]}
    plan = build_plan("bidirectional", kept_lengths=[5, 1], **live, live_spans=[2])
    layout = build_layout(plan, MIXED)
    twin = pickle.loads(pickle.dumps(layout))
    twin.check(pickle.loads(pickle.dumps(plan)), MIXED)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(twin), tensors_of(layout), strict=True))


def tensors_of(value):
    """Every tensor in a layout or a plan, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize(
    ("lengths", "live"),
    [
        ([30, 60], {}),
        ([5, 1, 30, 60], {}),
        ([30], {"live_document": [0] * 3, "live_split": [4] * 3, "live_spans": [1, 2]}),
    ],
    ids=["one flash problem", "mixed", "spans"],
)
def test_all_of_a_layout_goes_to_the_device_with_its_masks(lengths, live):
    plan = build_plan("bidirectional", kept_lengths=lengths, **live)
    layout = build_layout(plan, MIXED).with_masks(torch.float32)
    moved = layout.to("meta")
    tensors = tensors_of(moved)
    assert len(tensors) == len(tensors_of(layout)) > 0
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.is_one_flash_problem == (lengths == [30, 60])
    spans = moved.spans.layout.tiles if live else ()
    assert len(spans) == bool(live)
    assert all(tile.masks.bias.device.type == "meta" for tile in (*moved.tiles, *spans))


def test_masks_are_built_where_the_layout_lies():
    layout = build_layout(build_plan("causal", kept_lengths=[5, 3]), MIXED).to("meta")
    assert all(tile.masks.bias.device.type == "meta" for tile in layout.with_masks(torch.bfloat16).tiles)


def test_masks_of_long_documents_with_many_live_rows_are_not_kept():
    """Kept for all tiles, they would take 3 x 2 or 4 bytes per pair of live row and key: gigabytes at 32k tokens."""
    live = 4096
    plan = build_plan(
        "bidirectional",
        kept_lengths=[4096, 3],
        live_document=[0] * live + [1],
        live_split=[*sorted(torch.randint(1, 4097, (live,)).tolist()), 1],
    )
    policy = LayoutPolicy(flash_from=1, tile_scores=1 << 20, tile_min_rows=64)
    layout = build_layout(plan, policy).with_masks(torch.float32)
    pairs = {True: 0, False: 0}
    for tile in layout.tiles:
        pairs[tile.keeps_masks] += tile.shape[0] * tile.shape[1] * tile.shape[2]
        assert (tile.masks is not None) == tile.keeps_masks
    assert pairs[True] <= tiles._KEPT_SCORES
    assert pairs[True] + pairs[False] >= live * 4096
    assert layout.tiles[-1].keeps_masks


POLICY = backends.resolve("cpu-flash", torch.float64, 16, torch.device("cpu")).policy


@pytest.mark.parametrize(
    ("mode", "spans"), [("bidirectional", None), ("bidirectional", "run"), ("causal", None)]
)
def test_the_result_is_the_same_bit_by_bit_with_the_batchs_layout(mode, spans):
    problem = make_problem([70, 1, 33, 90], mode=mode, mask_rate=0.4, seed=21, spans=spans)
    plain = problem.packed(packed_attention, backend="cpu-flash")
    layout = build_layout(problem.plan, POLICY)
    assert layout.tiles and layout.flash
    for given in (layout, layout.with_masks(torch.float64)):
        found = problem.packed(packed_attention, backend="cpu-flash", layout=given)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_layout_by_another_policy_is_refused():
    problem = make_problem([70, 1, 33], seed=22)
    layout = build_layout(problem.plan, MIXED)
    with pytest.raises(
        ValueError, match=r"built by LayoutPolicy\(flash_from=20.*needs LayoutPolicy\(flash_from=64"
    ):
        problem.packed(packed_attention, backend="cpu-flash", layout=layout)


@pytest.mark.parametrize(
    "other",
    [
        build_plan("bidirectional", kept_lengths=[20, 11]),
        build_plan("causal", kept_lengths=[20, 10]),
        build_plan("bidirectional", kept_lengths=[30]),
        build_plan("bidirectional", kept_lengths=[10, 19], live_document=[1], live_split=[2]),
        build_plan("bidirectional", kept_lengths=[25, 5]),
        build_plan("bidirectional", kept_lengths=[10, 20]),
    ],
    ids=["rows", "mode", "documents", "live rows", "longest document", "order"],
)
def test_a_layout_of_another_batch_is_refused(other):
    problem = make_problem([20, 10], mask_rate=0.0, seed=23)
    with pytest.raises(ValueError, match="the layout was built for another batch: PlanOutline"):
        problem.packed(packed_attention, backend="cpu-flash", layout=build_layout(other, POLICY))


def test_a_layout_of_other_live_rows_is_refused():
    problem = make_problem([20, 20, 20], mask_rate=0.6, seed=23)
    plan = problem.plan
    splits = plan.live_split.clone()
    splits[plan.live_split > 1] -= 1  # as many live rows, of the same documents, elsewhere
    kept = plan.cu_seqlens.diff()
    other = build_plan(plan.mode, kept_lengths=kept, live_document=plan.live_document, live_split=splits)
    assert other.num_live == plan.num_live > 0
    with pytest.raises(ValueError, match="the layout was built for another batch"):
        problem.packed(packed_attention, backend="cpu-flash", layout=build_layout(other, POLICY))


def test_a_layout_of_other_spans_is_refused():
    """It would train as if live rows were no keys, or those of others."""
    problem, other, without = (
        make_problem([40], mask_rate=0.8, seed=26, spans=spans) for spans in ("run", "document", None)
    )
    for plan in (other.plan, without.plan):
        with pytest.raises(ValueError, match="the layout was built for another batch"):
            problem.packed(packed_attention, backend="cpu-flash", layout=build_layout(plan, POLICY))


def test_masks_of_another_dtype_are_refused():
    problem = make_problem([5, 9], seed=24)
    layout = build_layout(problem.plan, POLICY).with_masks(torch.float32)
    with pytest.raises(ValueError, match="masks are of torch.float32, q, k and v of torch.float64"):
        problem.packed(packed_attention, backend="cpu-flash", layout=layout)
