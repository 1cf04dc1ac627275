"""The plan: row order, flip indices, refusals, and its life across devices and processes."""

from __future__ import annotations

import pickle

import pytest
import torch

from bico_ds.attention import tiles
from bico_ds.attention.layout import LayoutPolicy, layout_of
from bico_ds.attention.plan import build_plan


def test_flip_rows_go_backwards_and_leave_out_single_token_documents():
    plan = build_plan("bidirectional", kept_lengths=[3, 1, 4])
    assert plan.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert plan.cu_seqlens.dtype == torch.int32
    assert plan.flip_rows.tolist() == [1, 0, 6, 5, 4]
    assert plan.flip_key_rows.tolist() == [2, 1, 7, 6, 5]
    assert plan.flip_rows.dtype == plan.flip_key_rows.dtype == torch.int64
    assert plan.flip_cu_seqlens.tolist() == [0, 2, 5]
    assert (plan.max_seqlen, plan.flip_max_seqlen, plan.num_kept, plan.num_live) == (4, 3, 8, 0)


def test_causal_mode_has_no_anti_causal_pass():
    plan = build_plan("causal", kept_lengths=[3, 1, 4])
    assert plan.flip_rows.numel() == 0
    assert plan.flip_max_seqlen == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept_lengths": []}, "at least one document"),
        ({"kept_lengths": [3, 0, 2]}, "document 1 .* 0 kept tokens"),
        ({"kept_lengths": [3.0]}, "must hold integers"),
        ({"kept_lengths": [3], "live_document": [0]}, "live_document has 1 entries, live_split has 0"),
        ({"kept_lengths": [3], "live_document": [1], "live_split": [1]}, "must lie in 0 … 0"),
        (
            {"kept_lengths": [3], "live_document": [0], "live_split": [0]},
            "live row 0 of document 0: live_split is 0",
        ),
        (
            {"kept_lengths": [3], "live_document": [0], "live_split": [4]},
            "live_split is 4, must lie in 1 … 3",
        ),
        (
            {"kept_lengths": [3, 3], "live_document": [1, 0], "live_split": [1, 1]},
            "live row 1 is out of order",
        ),
        ({"kept_lengths": [3], "live_document": [0, 0], "live_split": [2, 1]}, "live row 1 is out of order"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_plan("bidirectional", **arguments)


def test_causal_mode_refuses_live_rows_and_unknown_modes_are_named():
    with pytest.raises(ValueError, match="causal mode has no live placeholders"):
        build_plan("causal", kept_lengths=[3], live_document=[0], live_split=[1])
    with pytest.raises(ValueError, match="'sideways'"):
        build_plan("sideways", kept_lengths=[3])


def test_layout_covers_every_row_once_and_every_layer_shares_it():
    plan = build_plan(
        "bidirectional", kept_lengths=[5, 1, 30, 7, 60], live_document=[0, 2, 4, 4], live_split=[2, 30, 1, 60]
    )
    policy = LayoutPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)
    layout = layout_of(plan, policy)
    assert layout_of(plan, policy) is layout
    tiled = torch.cat([tile.query_slots for tile in layout.tiles])
    rows = torch.cat([tiled[tiled < plan.num_rows], layout.flash[0].query_rows])
    assert rows.sort().values.tolist() == list(range(plan.num_rows))
    assert layout.flash[0].plan.cu_seqlens.tolist() == [0, 30, 90]


def test_plan_survives_a_worker_process_with_its_layout():
    plan = build_plan("bidirectional", kept_lengths=[5, 1], live_document=[0], live_split=[2])
    policy = LayoutPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)
    layout_of(plan, policy)
    twin = pickle.loads(pickle.dumps(plan))
    assert policy in twin.derived
    assert torch.equal(twin.flip_rows, plan.flip_rows)
    assert twin.to("cpu") is twin


def tensors_of(value):
    """Every tensor in a layout or a plan, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, list) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("lengths", [[30, 60], [5, 1, 30, 60]], ids=["one flash problem", "mixed"])
def test_the_layout_that_a_worker_built_goes_to_the_device_with_its_plan(lengths):
    plan = build_plan("bidirectional", kept_lengths=lengths)
    policy = LayoutPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)
    layout_of(plan, policy)
    moved = plan.to("meta")
    layout = moved.derived[policy]
    assert layout_of(moved, policy) is layout
    tensors = tensors_of(layout.flash) + tensors_of(layout.tiles)
    assert tensors and all(tensor.device.type == "meta" for tensor in tensors if tensor.numel())
    assert layout.is_one_flash_problem == (lengths == [30, 60])


def test_masks_of_long_documents_with_many_live_rows_are_not_kept():
    """Kept for all tiles, they would take 3 x 2 or 4 bytes a pair of live row and key: gigabytes at 32k tokens."""
    live = 4096
    plan = build_plan(
        "bidirectional",
        kept_lengths=[4096, 3],
        live_document=[0] * live + [1],
        live_split=[*sorted(torch.randint(1, 4097, (live,)).tolist()), 1],
    )
    layout = layout_of(plan, LayoutPolicy(flash_from=1, tile_scores=1 << 20, tile_min_rows=64))
    pairs = {True: 0, False: 0}
    for tile in layout.tiles:
        tile.factors(torch.float32)
        pairs[tile.keeps_masks] += tile.shape[0] * tile.shape[1] * tile.shape[2]
        assert bool(tile._masks) == tile.keeps_masks
    assert pairs[True] <= tiles._KEPT_SCORES
    assert pairs[True] + pairs[False] >= live * 4096
    assert layout.tiles[-1].keeps_masks
