"""Packing, cutting, mixing and dealing: nothing lost, nothing twice, nothing over capacity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.config.schema import SourceSpec
from bico_ds.data.loading.mixture import Mixture
from bico_ds.data.loading.packing import build_pack_plan, pack_histogram
from bico_ds.data.loading.plan_cache import cached_plan
from bico_ds.data.loading.rank_assignment import deal
from bico_ds.data.loading.sequences import cut, longest_row
from tests.data.stores import BOS, write_store

CAPACITY = 32
lengths_st = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120).map(np.array)


def bins_of(plan) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.row_order, plan.bin_offsets[1:-1])]


@given(lengths=lengths_st, seed=st.integers(0, 2**63), most=st.sampled_from([None, 1, 3]))
@settings(max_examples=150, deadline=None)
def test_every_row_is_packed_once_within_capacity_and_cap(lengths, seed, most):
    plan = build_pack_plan(lengths, capacity=CAPACITY, seed=seed, max_documents_per_bin=most)
    assert sorted(plan.row_order.tolist()) == list(range(len(lengths)))
    for rows in bins_of(plan):
        assert 0 < len(rows) <= (most or len(lengths))
        assert lengths[rows].sum() <= CAPACITY


@given(lengths=lengths_st)
@settings(max_examples=150, deadline=None)
def test_bins_are_those_of_best_fit_decreasing_row_by_row(lengths):
    plan = build_pack_plan(lengths, capacity=CAPACITY, seed=0)
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if not fitting:
            spaces.append(CAPACITY - length)
        else:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
    assert sorted(CAPACITY - lengths[rows].sum() for rows in bins_of(plan)) == sorted(spaces)


def test_the_plan_is_a_function_of_its_inputs_and_the_seed_draws_bin_mates():
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 5000)
    one, again = (build_pack_plan(lengths.copy(), capacity=CAPACITY, seed=7) for _ in range(2))
    other = build_pack_plan(lengths, capacity=CAPACITY, seed=8)
    assert one.fingerprint == again.fingerprint
    assert np.array_equal(one.row_order, again.row_order)
    assert other.fingerprint != one.fingerprint
    assert np.array_equal(other.bin_offsets, one.bin_offsets)
    assert np.array_equal(lengths[other.row_order], lengths[one.row_order])
    assert np.mean(other.row_order == one.row_order) < 0.05


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
    with pytest.raises(ValueError, match=r"row 1 has length 33, not in 1 … 32"):
        build_pack_plan(np.array([4, 33]), capacity=CAPACITY, seed=0)
    with pytest.raises(ValueError, match="nothing to pack"):
        build_pack_plan(np.array([], dtype=np.int64), capacity=CAPACITY, seed=0)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=20),
    longest=st.integers(2, 40),
    add_bos=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_split_pieces_reassemble_into_the_documents(tmp_path_factory, lengths, longest, add_bos):
    if sum(lengths) == 0:
        return
    store = write_store(tmp_path_factory.mktemp("s") / "store", lengths, add_bos=add_bos)
    rows = cut(store.lengths, longest=longest, overlong="split", bos_id=BOS if add_bos else None)
    documents = rows.read(np.arange(len(rows)), store, source=0)
    rebuilt: dict[int, list[int]] = {}
    for piece in documents:
        tokens = piece.token_ids.tolist()
        assert 1 <= len(tokens) <= longest
        if piece.piece and add_bos:
            assert tokens.pop(0) == BOS
        assert piece.piece == 0 or len(rebuilt[piece.id]) > 0
        rebuilt.setdefault(piece.id, []).extend(tokens)
    whole = {d.id: d.token_ids.tolist() for d in store.whole(np.arange(len(lengths))) if len(d.token_ids)}
    assert rebuilt == whole
    report = rows.report
    assert report.split == sum(length > longest for length in lengths)
    assert report.dropped == sum(length == 0 for length in lengths)
    assert report.lost_tokens == 0


def test_a_piece_counts_as_prompt_what_the_document_counts_as_prompt(tmp_path):
    store = write_store(tmp_path / "store", [50, 70, 33], add_bos=True)
    rows = cut(store.lengths, longest=10, overlong="split", bos_id=BOS)
    documents = rows.read(np.arange(len(rows)), store, source=0)
    targets = {d.id: 0 for d in documents}
    for piece in documents:
        targets[piece.id] += len(piece.token_ids) - max(piece.prompt_length, 1)
    for document in store.whole(np.arange(3)):
        assert targets[document.id] == len(document.token_ids) - max(document.prompt_length, 1)


def test_the_bos_of_a_later_piece_is_a_word_of_its_own_and_no_entity(tmp_path):
    store = write_store(tmp_path / "store", [50, 70, 33], add_bos=True, has_entities=True)
    rows = cut(store.lengths, longest=10, overlong="split", bos_id=BOS)
    pieces = rows.read(np.arange(len(rows)), store, source=0)
    for number, (start, length) in enumerate(zip(rows.start, rows.length, strict=True)):
        whole = store.whole(rows.document[number : number + 1])
        words, entities = (
            whole.word_starts[start : start + length],
            whole.entity_number[start : start + length],
        )
        if rows.piece[number]:
            words[0], entities[0] = True, 0
        at = slice(pieces.offsets[number], pieces.offsets[number + 1])
        assert np.array_equal(pieces.word_starts[at], words)
        assert np.array_equal(pieces.entity_number[at], entities)


def test_truncated_and_dropped_tokens_are_counted():
    lengths = np.array([5, 12, 0, 30])
    truncated = cut(lengths, longest=10, overlong="truncate")
    assert truncated.length.tolist() == [5, 10, 10]
    assert (truncated.report.truncated, truncated.report.dropped, truncated.report.lost_tokens) == (2, 1, 22)
    dropped = cut(lengths, longest=10, overlong="drop")
    assert dropped.document.tolist() == [0]
    assert (dropped.report.dropped, dropped.report.lost_tokens) == (3, 42)


def test_longest_row_respects_an_expansion_that_doubles():
    assert longest_row(lambda lengths: 2 * lengths, 33) == 16
    with pytest.raises(UserError, match=r"data\.capacity is 3"):
        longest_row(lambda lengths: 2 * lengths, 3)


@pytest.mark.parametrize("passes", [{"epochs": 1.0}, {"epochs": 2.0}, {"epochs": 0.3}, {"epochs": 1.7}])
def test_over_epochs_a_source_passes_as_often_as_asked_and_evenly(passes):
    mixture = Mixture.of([SourceSpec(store="a", **passes), SourceSpec(store="b")], [11, 7], seed=3)
    seen: dict[int, list[int]] = {row: [] for row in range(18)}
    for epoch in range(10):
        rows = mixture.epoch(epoch)
        for row, number in zip(rows.row.tolist(), rows.passes.tolist(), strict=True):
            seen[row].append(number)
    for row in range(11):
        assert seen[row] == list(range(len(seen[row])))  # one of each pass: no mask is drawn twice
        assert abs(len(seen[row]) - 10 * passes["epochs"]) < 1
    assert sum(len(seen[row]) for row in range(11)) == int(10 * passes["epochs"] * 11)
    assert all(seen[row] == list(range(10)) for row in range(11, 18))


def test_a_data_epoch_without_a_row_is_refused_with_the_least_that_has_one():
    sources = [SourceSpec(store="a", epochs=0.001), SourceSpec(store="b", epochs=0.05)]
    with pytest.raises(
        UserError, match=r"data\.sources\[1\]\.epochs: 0\.05 of its 11 rows.*give at least 0\.091"
    ):
        Mixture.of(sources, [3, 11], seed=0)
    enough = Mixture.of([sources[0], SourceSpec(store="b", epochs=0.091)], [3, 11], seed=0)
    assert all(len(enough.epoch(number).row) for number in range(30))


def test_weights_are_shares_of_the_sampled_rows():
    mixture = Mixture.of(
        [SourceSpec(store="a", weight=3.0), SourceSpec(store="b", weight=1.0)], [100, 900], seed=0
    )
    rows = mixture.epoch(4)
    assert len(rows.row) == 1000
    assert np.mean(rows.row < 100) == pytest.approx(0.75)
    assert not mixture.repeats


@given(
    seed=st.integers(0, 2**31),
    world_size=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 3]),
    rounds=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_dealing_gives_every_bin_to_one_rank(seed, world_size, micro, rounds):
    cost = np.random.default_rng(seed).integers(1, 10_000, world_size * micro * rounds)
    dealt = deal(cost, micro_batch_bins=micro, world_size=world_size)
    assert dealt.shape == (world_size, rounds, micro)
    assert sorted(dealt.ravel().tolist()) == list(range(len(cost)))


def test_ranks_and_the_rounds_they_run_together_have_like_attention_cost():
    cost = np.random.default_rng(0).integers(1_000, 10_000, 256)
    for micro in (1, 2):
        micro_cost = cost[deal(cost, micro_batch_bins=micro, world_size=4)].sum(axis=2)
        loads = micro_cost.sum(axis=1)
        assert loads.max() / loads.mean() < 1.005
        waited = micro_cost.max(axis=0).sum() / micro_cost.mean(axis=0).sum()
        unsorted = cost.reshape(4, -1, micro).sum(axis=2)
        assert waited - 1 < 0.2 * (unsorted.max(axis=0).sum() / unsorted.mean(axis=0).sum() - 1)


def test_a_big_plan_is_built_once_then_mapped_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("bico_ds.data.loading.plan_cache._BIG", 100)
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 500)
    plain = build_pack_plan(lengths, capacity=CAPACITY, seed=1)
    built = []

    def build(row_lengths, **arguments):
        built.append(arguments)
        return build_pack_plan(row_lengths, **arguments)

    for seed in (1, 1, 2, 1):
        plan = cached_plan(build, lengths, folder=tmp_path / "plans", capacity=CAPACITY, seed=seed)
        assert isinstance(plan.row_order, np.memmap)
        assert (plan.fingerprint == plain.fingerprint) == (seed == 1)
        if seed == 1:
            assert np.array_equal(plan.row_order, plain.row_order)
            assert plan.rows_of(np.array([3, 0]))[0].tolist() == plain.rows_of(np.array([3, 0]))[0].tolist()
    assert [arguments["seed"] for arguments in built] == [1, 2]
    (tmp_path / "file").write_text("")
    kept = cached_plan(build, lengths, folder=tmp_path / "file", capacity=CAPACITY, seed=1)
    assert kept.fingerprint == plain.fingerprint
    assert not isinstance(kept.row_order, np.memmap)
