"""The bins of a global batch go to ranks and micro-batches: each to one, at a similar attention cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.data.loading.rank_assignment import assign_to_ranks


@given(
    seed=st.integers(0, 2**31),
    world_size=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 3]),
    rounds=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_bin_is_assigned_to_one_rank(seed, world_size, micro, rounds):
    cost = np.random.default_rng(seed).integers(1, 10_000, world_size * micro * rounds)
    assigned = assign_to_ranks(cost, micro_batch_bins=micro, world_size=world_size)
    assert assigned.shape == (world_size, rounds, micro)
    assert sorted(assigned.ravel().tolist()) == list(range(len(cost)))


def test_ranks_and_the_rounds_they_run_together_have_similar_attention_cost():
    cost = np.random.default_rng(0).integers(1_000, 10_000, 256)
    for micro in (1, 2):
        micro_cost = cost[assign_to_ranks(cost, micro_batch_bins=micro, world_size=4)].sum(axis=2)
        loads = micro_cost.sum(axis=1)
        assert loads.max() / loads.mean() < 1.005
        waited = micro_cost.max(axis=0).sum() / micro_cost.mean(axis=0).sum()
        unsorted = cost.reshape(4, -1, micro).sum(axis=2)
        assert waited - 1 < 0.2 * (unsorted.max(axis=0).sum() / unsorted.mean(axis=0).sum() - 1)
