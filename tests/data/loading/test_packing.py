"""Pack plans: nothing lost, nothing twice, nothing over capacity; big ones are kept on disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.data.loading.packing import build_pack_plan, pack_histogram
from bico_ds.data.loading.plan_cache import cached_plan

CAPACITY = 32
lengths_st = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120).map(np.array)


def bins_of(plan) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.sequence_order, plan.bin_offsets[1:-1])]


@given(lengths=lengths_st, seed=st.integers(0, 2**63), most=st.sampled_from([None, 1, 3]))
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_packed_once_within_capacity_and_cap(lengths, seed, most):
    plan = build_pack_plan(lengths, capacity=CAPACITY, seed=seed, max_documents_per_bin=most)
    assert sorted(plan.sequence_order.tolist()) == list(range(len(lengths)))
    for members in bins_of(plan):
        assert 0 < len(members) <= (most or len(lengths))
        assert lengths[members].sum() <= CAPACITY


@given(lengths=lengths_st)
@settings(max_examples=150, deadline=None)
def test_bins_are_those_of_best_fit_decreasing_one_by_one(lengths):
    plan = build_pack_plan(lengths, capacity=CAPACITY, seed=0)
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if not fitting:
            spaces.append(CAPACITY - length)
        else:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
    assert sorted(CAPACITY - lengths[members].sum() for members in bins_of(plan)) == sorted(spaces)


def test_the_plan_is_a_function_of_its_inputs_and_the_seed_draws_bin_mates():
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 5000)
    one, again = (build_pack_plan(lengths.copy(), capacity=CAPACITY, seed=7) for _ in range(2))
    other = build_pack_plan(lengths, capacity=CAPACITY, seed=8)
    assert one.fingerprint == again.fingerprint
    assert np.array_equal(one.sequence_order, again.sequence_order)
    assert other.fingerprint != one.fingerprint
    assert np.array_equal(other.bin_offsets, one.bin_offsets)
    assert np.array_equal(lengths[other.sequence_order], lengths[one.sequence_order])
    assert np.mean(other.sequence_order == one.sequence_order) < 0.05


@pytest.mark.parametrize(
    ("name", "mean", "fill"), [("facts", 39, 0.999), ("lognormal", 585, 0.999), ("long", 2035, 0.995)]
)
def test_fill_on_realistic_lengths(name, mean, fill):
    rng = np.random.default_rng(1)
    draws = {
        "facts": rng.normal(mean, 8, 1_000_000),
        "lognormal": rng.lognormal(np.log(mean) - 0.5, 1.0, 1_000_000),
        "long": rng.uniform(1, 2 * mean, 1_000_000),
    }
    lengths = np.clip(draws[name], 1, 4096).astype(np.int64)
    groups = pack_histogram(np.bincount(lengths), capacity=4096)
    assert lengths.sum() / (groups.num_bins * 4096) >= fill


def test_a_length_outside_the_bin_is_refused():
    with pytest.raises(ValueError, match=r"sequence 1 has length 33, not in 1 … 32"):
        build_pack_plan(np.array([4, 33]), capacity=CAPACITY, seed=0)
    with pytest.raises(ValueError, match="nothing to pack"):
        build_pack_plan(np.array([], dtype=np.int64), capacity=CAPACITY, seed=0)


def test_a_big_plan_is_built_once_then_mapped_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("bico_ds.data.loading.plan_cache._BIG", 100)
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 500)
    plain = build_pack_plan(lengths, capacity=CAPACITY, seed=1)
    built = []

    def build(lengths, **arguments):
        built.append(arguments)
        return build_pack_plan(lengths, **arguments)

    for seed in (1, 1, 2, 1):
        plan = cached_plan(build, lengths, folder=tmp_path / "plans", capacity=CAPACITY, seed=seed)
        assert isinstance(plan.sequence_order, np.memmap)
        assert (plan.fingerprint == plain.fingerprint) == (seed == 1)
        if seed == 1:
            assert np.array_equal(plan.sequence_order, plain.sequence_order)
            assert (
                plan.sequences_of(np.array([3, 0]))[0].tolist()
                == plain.sequences_of(np.array([3, 0]))[0].tolist()
            )
    assert [arguments["seed"] for arguments in built] == [1, 2]
    (tmp_path / "file").write_text("")
    kept = cached_plan(build, lengths, folder=tmp_path / "file", capacity=CAPACITY, seed=1)
    assert kept.fingerprint == plain.fingerprint
    assert not isinstance(kept.sequence_order, np.memmap)


def test_a_damaged_plan_on_disk_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("bico_ds.data.loading.plan_cache._BIG", 100)
    rng = np.random.default_rng()
    lengths = rng.integers(1, CAPACITY, 500)
    plain = build_pack_plan(lengths, capacity=CAPACITY, seed=1)
    cached_plan(build_pack_plan, lengths, folder=tmp_path, capacity=CAPACITY, seed=1)
    (folder,) = tmp_path.iterdir()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for limit in [len(content)] * 10 + [min(len(content), 128)] * 10:
            damaged = bytearray(content)
            damaged[rng.integers(limit)] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            plan = cached_plan(build_pack_plan, lengths, folder=tmp_path, capacity=CAPACITY, seed=1)
            assert np.array_equal(plan.sequence_order, plain.sequence_order)
            assert np.array_equal(plan.bin_offsets, plain.bin_offsets)
            assert (plan.fingerprint, plan.capacity) == (plain.fingerprint, CAPACITY)
        file.write_bytes(content)
