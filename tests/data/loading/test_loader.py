"""The elastic loader: one sample stream at any world size, from any step on; nothing lost, nothing twice."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.attention.layout import LayoutPolicy
from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.mixture import Mixture
from bico_ds.data.loading.sequences import cut_documents
from bico_ds.data.loading.stream import BinStream, Position
from tests.data.loading.loaders import DOUBLING, GLOBAL, consumed, make, schedule_of, state_at, stream_of
from tests.data.stores import BOS, write_store


def contents(batch) -> list[tuple]:
    """A batch as (name, visible tokens with positions, predictions) of each document, whatever its place."""
    plan, cu = batch.plan, batch.plan.cu_seqlens.tolist()
    document_of_row = np.repeat(np.arange(len(cu) - 1), np.diff(cu)).tolist() + plan.live_document.tolist()
    rows: list[list] = [[] for _ in range(len(cu) - 1)]
    predictions: list[list] = [[] for _ in range(len(cu) - 1)]
    positions = batch.position_ids.tolist()
    for row, token in enumerate(batch.input_ids.tolist()):
        rows[document_of_row[row]].append((token, positions[row]))
    for row, target in zip(batch.loss_rows.tolist(), batch.targets.tolist(), strict=True):
        predictions[document_of_row[row]].append((positions[row], target))
    names = map(tuple, batch.documents.tolist())
    return list(zip(names, map(tuple, rows), map(tuple, map(sorted, predictions)), strict=True))


def global_step(world, step, *, size, micro, state=None, **changes) -> Counter:
    """All documents of one step, from a loader of every rank; all ranks have as many micro-batches."""
    ranks = [make(world, size=size, micro=micro, rank=r, state=state, **changes) for r in range(size)]
    batches = [loader.step(step).batches for loader in ranks]
    assert {len(own) for own in batches} == {GLOBAL // (size * micro)}
    return Counter(item for own in batches for batch in own for item in contents(batch))


@pytest.fixture(scope="module")
def uninterrupted(world):
    """The contents of each step of one rank that never stops: more than two epochs."""
    loader = make(world)
    assert loader.total_steps(2) < 36
    return [Counter(item for batch in loader.step(s).batches for item in contents(batch)) for s in range(36)]


@given(
    stops=st.lists(st.integers(1, 35), max_size=4, unique=True).map(sorted),
    draws=st.lists(
        st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]), min_size=5, max_size=5
    ),
)
@settings(max_examples=8, deadline=None)
def test_stream_and_masks_are_identical_at_any_size_stopped_and_resumed_anywhere(
    world, uninterrupted, stops, draws
):
    state = None
    for (begin, end), (size, micro) in zip(zip([0, *stops], [*stops, 36], strict=True), draws, strict=False):
        ranks = [make(world, size=size, micro=micro, rank=rank, state=state) for rank in range(size)]
        for step in range(begin, end):
            seen = Counter(
                item for loader in ranks for batch in loader.step(step).batches for item in contents(batch)
            )
            assert seen == uninterrupted[step], (step, size, micro)
        states = [json.dumps(state_at(loader, end)) for loader in ranks]
        assert len(set(states)) == 1
        state = json.loads(states[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"repack_every_epoch": True},
        {"max_documents_per_bin": 2},
        {"epochs": (2.0, 1.0)},
        {"epochs": (0.4, 1.5)},
        {"overlong": "drop"},
    ],
    ids=str,
)
def test_every_token_appears_as_often_as_asked(world, changes):
    stores, data = world
    spec, epochs = data(**changes), 4
    bos = [store.manifest.bos_id if store.manifest.add_bos else None for store in stores]
    sequences = [
        cut_documents(store.lengths, longest=64, overlong=spec.overlong, bos_id=bos_id)
        for store, bos_id in zip(stores, bos, strict=True)
    ]
    counts = [len(part) for part in sequences]
    mixture = Mixture.of(spec.sources, counts, [int(part.length.sum()) for part in sequences], seed=1)
    stream = BinStream(sequences, mixture, lambda lengths: lengths, spec, seed=1)
    counts = [Counter(), Counter()]
    total = sum(stream.num_bins(epoch) for epoch in range(epochs))
    assert stream.advance(Position(), total) == Position(epoch=epochs, bin=0)
    bins = stream.take(Position(), total)
    assert np.add.reduceat(bins.length, bins.offsets[:-1]).max() <= 64
    for source, store in enumerate(stores):
        tokens = sequences[source].read(bins.sequence[bins.source == source], store, source=source).token_ids
        counts[source].update(tokens[tokens != BOS].tolist())
        expected = {
            token
            for document in store.whole(np.arange(len(store)))
            if spec.overlong != "drop" or len(document.token_ids) <= 64
            for token in document.token_ids.tolist()
            if token != BOS
        }
        asked = epochs * (spec.sources[source].epochs or 1.0)
        assert set(counts[source]) == expected
        assert all(abs(count - asked) < 1 for count in counts[source].values())


def test_the_rest_of_an_epoch_carries_over_into_the_next_ones_first_batch(world):
    loader = make(world, schedule=schedule_of([NtpSpec(kind="ntp")]), micro=GLOBAL)
    per_epoch = loader.report()[0].bins
    assert per_epoch % GLOBAL
    names = Counter()
    for step in range(per_epoch):  # GLOBAL complete epochs
        for batch in loader.step(step).batches:
            names.update(map(tuple, batch.documents.tolist()))
    assert set(names.values()) == {GLOBAL}


def test_bins_keep_their_mates_unless_repacked_and_change_their_order(world):
    def epochs(loader):
        """Two times GLOBAL epochs, so that both end with a complete step."""
        steps = 2 * loader.report()[0].bins
        bins = [
            tuple(sorted(map(tuple, b.documents.tolist())))
            for s in range(steps)
            for b in loader.step(s).batches
        ]
        return bins[: len(bins) // 2], bins[len(bins) // 2 :]

    for repack in (False, True):
        loader = make(world, schedule=schedule_of([NtpSpec(kind="ntp")]), repack_every_epoch=repack)
        first, second = epochs(loader)
        assert first != second
        assert (sorted(first) == sorted(second)) == (not repack)


def test_masks_change_with_the_pass_and_a_document_twice_in_an_epoch_has_two_masks(world):
    loader = make(
        world, schedule=schedule_of([BicoSpec(kind="bico", mask=MaskSpec(rate=0.5))]), epochs=(2.0, 1.0)
    )
    masks: dict[tuple, set] = {}
    for step in range(2 * loader.total_steps(1)):
        for batch in loader.step(step).batches:
            for name, rows, _ in contents(batch):
                masks.setdefault(name, []).append(rows)
    long = [seen for seen in masks.values() if max(len(rows) for rows in seen) > 12]
    assert long
    assert all(len(set(seen)) == len(seen) for seen in long)


def test_objectives_with_another_expansion_have_a_cursor_of_their_own(world):
    schedule = schedule_of([NtpSpec(probability=0.5), DOUBLING.DoublingSpec(probability=0.5)])
    loader = make(world, schedule=schedule)
    assert [report.objectives for report in loader.report()] == [("ntp",), ("doubling",)]
    names = {"ntp": Counter(), "doubling": Counter()}
    for step in range(60):
        objective = schedule(step)
        for batch in loader.step(step).batches:
            assert batch.represented_tokens <= (64 if objective.name == "ntp" else 32)
            names[objective.name].update(map(tuple, batch.documents.tolist()))
    assert len(names["doubling"]) > len(names["ntp"])  # longer sequences: more documents are split
    assert all(max(counter.values()) - min(counter.values()) <= 1 for counter in names.values())
    state = state_at(loader, 23)
    resumed = make(world, schedule=schedule, state=state, size=2, rank=1)
    uninterrupted = make(world, schedule=schedule, size=2, rank=1)
    for step in (23, 24, 40):
        assert [contents(b) for b in resumed.step(step).batches] == [
            contents(b) for b in uninterrupted.step(step).batches
        ]


def test_workers_change_nothing_and_the_state_does_not_run_ahead(world):
    plain, threaded = make(world), make(world, workers=2)
    for step in range(12):
        ours, theirs = threaded.step(step).batches, plain.step(step).batches
        assert [contents(b) for b in ours] == [contents(b) for b in theirs]
    time.sleep(0.1)
    assert state_at(threaded, 12) == state_at(plain, 12)
    assert threaded.wait_seconds > 0
    threaded.close()


class WatchedPolicy(LayoutPolicy):
    """Notes the threads that read it."""

    threads: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        if name == "tile_scores":
            self.threads.add(threading.current_thread().name)
        return super().__getattribute__(name)


def test_workers_lay_out_the_batch_for_the_attention_kernels(world):
    policy = WatchedPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)
    loader = ElasticLoader(stream_of(world, workers=2), RankShare(layout_policy=policy))
    batches = [batch for step in range(4) for batch in loader.step(step).batches]
    loader.close()
    assert policy.threads
    assert all(name.startswith("loader") for name in policy.threads)
    for batch in batches:
        batch.layout.check(batch.plan, policy)
    assert all(batch.layout is None for batch in make(world).step(0).batches)


def test_totals_by_source_survive_a_resume(world):
    loader = make(world)
    names = loader.source_names
    expected = {name: [0, 0] for name in names}
    for step in range(20):
        for item in loader.step(step).batches:
            for source, _, _ in item.documents.tolist():
                expected[names[source]][0] += 1
    state = state_at(loader, 9)
    resumed = consumed(make(world, size=4, rank=2, state=state), 20).by_source()
    assert resumed == consumed(loader, 20).by_source()
    assert {name: total["rows"] for name, total in resumed.items()} == {n: e[0] for n, e in expected.items()}


def test_big_plans_are_kept_where_the_environment_says(world, tmp_path, monkeypatch):
    monkeypatch.setattr("bico_ds.data.loading.plan_cache._BIG", 100)
    monkeypatch.setenv("SCRATCH_HERE", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    make(world, cache_dir="${SCRATCH_HERE}/cache").step(0)
    assert list((tmp_path / "scratch" / "cache" / "plans").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_an_indivisible_global_batch_is_refused_with_the_numbers_that_divide(world):
    with pytest.raises(UserError, match=r"global_batch_bins \(8\) must be .* ranks \(3\) = 3: choose 6 or 9"):
        make(world, size=3)


def test_a_source_with_nothing_to_train_on_is_named(tmp_path):
    store = write_store(tmp_path / "long", [500, 600])
    data = DataSpec(sources=[SourceSpec(store="x/long")], capacity=64, overlong="drop", workers=0)
    with pytest.raises(UserError, match=r"source 'long' has nothing to train on"):
        make(([store], lambda: data))
