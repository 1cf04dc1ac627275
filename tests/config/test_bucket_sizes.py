"""ZeRO's buckets by model and cluster: a run and its plan take the same, and each limit holds where it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bico_ds.config.deepspeed_file import bucket_size, bucket_sizes
from bico_ds.config.load import load_recipe
from bico_ds.planner.deployment import read_zero
from bico_ds.runtime.ds_config import build_ds_config

SQUARE = 4096**2


@pytest.mark.parametrize(
    ("hidden", "nodes", "elements", "why"),
    [
        (128, 1, 1_000_000, "small model"),
        (128, 64, 1_000_000, "small model"),
        (4096, 1, SQUARE, "square weight"),
        (8192, 8, 8192**2, "square weight"),  # already more than a ring of 64 ranks needs
        (4096, 8, 64_000_000, "ring of 64 ranks"),
        (4096, 64, 12 * SQUARE, "a layer"),
        (8192, 128, 500_000_000, "2 GB in fp32"),
    ],
)
def test_a_bucket_is_as_large_as_the_slowest_of_its_links_needs_and_memory_bears(
    hidden, nodes, elements, why
):
    found = bucket_size(hidden, ranks=8 * nodes, nodes=nodes)
    assert found.elements == elements
    assert why in found.why


def test_more_nodes_never_make_a_bucket_smaller():
    generator = np.random.default_rng()
    for hidden in generator.integers(64, 16384, 20):
        sizes = [bucket_size(int(hidden), ranks=8 * n, nodes=n).elements for n in (1, 2, 4, 8, 64, 512)]
        assert sizes == sorted(sizes), hidden
        assert sizes[0] == max(hidden**2, 10**6)


def test_zero_2_gathers_an_even_number_whatever_the_hidden_size():
    assert bucket_sizes(1001, ranks=2, ranks_per_node=8)["allgather_bucket_size"] == 1001**2 + 1


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (1, 8), (2, 8), (8, 4), (32, 8)])
def test_a_run_and_its_plan_take_the_same_buckets(nodes, per_node):
    ranks, hidden = nodes * per_node, int(np.random.default_rng().integers(64, 9000))
    batch = [f"training.global_batch_bins={ranks}", "training.micro_batch_bins=1"]
    for name, keys in (
        ("zero2_bf16", ("allgather_bucket_size",)),
        ("zero3_bf16", ("stage3_prefetch_bucket_size",)),
    ):
        recipe = load_recipe("tiny_base", [*batch, f"deepspeed.config={name}"])
        config = build_ds_config(
            recipe,
            world_size=ranks,
            hidden_size=hidden,
            on_cuda=True,
            run_folder=Path("x"),
            ranks_per_node=per_node,
        )
        zero = read_zero(recipe, hidden_size=hidden, ranks=ranks, ranks_per_node=per_node, on_cuda=True)
        planned = {
            "reduce_bucket_size": zero.reduce_bucket,
            "allgather_bucket_size": zero.allgather_bucket,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket,
        }
        for key in ("reduce_bucket_size", *keys):
            assert config["zero_optimization"][key] == planned[key], key
