"""The index tables of the Triton kernels, against loops over rows and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.attention.packed import packed_attention
from bico_ds.attention.triton.row_blocks import BlockSizes
from bico_ds.attention.triton.tilings import TILINGS, tiling_of
from tests.attention.attention_problems import make_problem

POLICY = LayoutPolicy(
    flash_from=50, tile_scores=0, tile_min_rows=0, blocks=BlockSizes(rows=8, keys=5), hidden_cost=1e9
)


def random_blocks(mode, seed):
    """A layout's blocks, and per document its keys and its (split, row) in their order, of those that are not in flash."""
    lengths = np.random.default_rng(seed).integers(1, 80, 20)
    plan = make_problem(lengths, mode=mode, mask_rate=0.4, seed=seed).plan
    kept = plan.cu_seqlens.diff().tolist()
    starts = plan.cu_seqlens.tolist()
    documents = []
    for document, count in enumerate(kept):
        own = plan.live_document == document
        live = plan.num_kept + torch.arange(plan.num_live)[own]
        rows = list(zip(plan.live_split[own].tolist(), live.tolist(), strict=True))
        if count < POLICY.flash_from:
            rows += [(j + 1, starts[document] + j) for j in range(count)]
        documents.append((starts[document], count, sorted(rows)))
    return build_layout(plan, POLICY).blocks, [d for d in documents if d[2]]


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_every_row_is_in_one_block_with_its_split_and_the_keys_of_its_document(mode):
    blocks, documents = random_blocks(mode, seed=1)
    table = list(zip(blocks.split.tolist(), blocks.rows.tolist(), strict=True))
    assert table == [row for *_, rows in documents for row in rows]
    found = {}
    for begin, end, key0, keys in blocks.query_blocks.tolist():
        assert 0 < end - begin <= 8
        for split, row in table[begin:end]:
            assert row not in found
            found[row] = split, key0, keys
    assert found == {row: (split, start, count) for start, count, rows in documents for split, row in rows}


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_every_key_is_in_one_block_with_the_rows_that_take_it_in_each_direction(mode):
    blocks, documents = random_blocks(mode, seed=2)
    splits = blocks.split.tolist()
    rows_of = {start: (count, rows) for start, count, rows in documents}
    served = set()
    for first, key0, keys, begin, some_forward, all_forward, end in blocks.key_blocks.tolist():
        count, rows = rows_of[key0]
        block = range(first, min(first + 5, count))
        assert keys == count
        assert splits[begin:end] == [split for split, _ in rows]
        served |= {(key0, j) for j in block}
        for entry in range(begin, end):
            assert (entry >= some_forward) == any(j < splits[entry] for j in block)
            assert (entry >= all_forward) == all(j < splits[entry] for j in block)
    assert served == {(start, j) for start, count, _ in documents for j in range(count)}
    assert len(blocks.key_blocks) == sum(-(-count // 5) for _, count, _ in documents)


def test_blocks_with_the_most_work_come_first():
    blocks, _ = random_blocks("causal", seed=3)
    keys = blocks.query_blocks[:, 3]
    assert torch.equal(keys, keys.sort(descending=True).values)
    _, _, _, begin, _, _, end = blocks.key_blocks.unbind(1)
    assert torch.equal(end - begin, (end - begin).sort(descending=True).values)


def test_a_layout_of_other_block_sizes_is_refused():
    problem = make_problem([20], seed=4)
    tensors = {name: getattr(problem, name).to("meta") for name in ("q", "k", "v", "cos", "sin")}
    rows = {name: x[: problem.plan.num_rows] for name, x in tensors.items()}
    policy = LayoutPolicy(flash_from=float("inf"), tile_scores=0, tile_min_rows=0, blocks=POLICY.blocks)
    with pytest.raises(ValueError, match=r"built by .*BlockSizes\(rows=8, keys=5\).* needs "):
        packed_attention(
            **rows, plan=problem.plan, backend="triton", layout=build_layout(problem.plan, policy)
        )


def test_a_gpu_newer_than_all_known_ones_takes_the_tiling_of_the_newest():
    newest = max(TILINGS)
    assert tiling_of((newest[0] + 1, 0), 96) == TILINGS[newest][128]
