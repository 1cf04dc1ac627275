"""The elastic loader: one sample stream at any world size, from any step on; nothing lost, nothing twice."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import BOS, EOS, write_store

from bico_ds.attention.layout import LayoutPolicy
from bico_ds.config.errors import UserError
from bico_ds.config.imports import import_module
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.paths import WrittenPath
from bico_ds.config.schema import DataSpec, SourceSpec
from bico_ds.data import identity
from bico_ds.data.loader import ElasticLoader, RankShare
from bico_ds.data.mixture import Mixture
from bico_ds.data.rows import cut
from bico_ds.data.sample_order import SampleOrder, StreamSpec
from bico_ds.data.stream import BinStream, Position
from bico_ds.objectives.base import TokenFacts
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.objectives.schedule import ObjectiveSchedule

DOUBLING = import_module(WrittenPath(str(Path(__file__).parents[1] / "objectives" / "doubling.py")))
TOKENS = TokenFacts(special_ids=(BOS, EOS), placeholder_id=0, vocabulary=100_000)
HALVES = [NtpSpec(kind="ntp", probability=0.5), BicoSpec(kind="bico", probability=0.5)]
GLOBAL = 8


def schedule_of(specs=HALVES, seed=1) -> ObjectiveSchedule:
    objectives = build_objectives(specs, TOKENS)
    return ObjectiveSchedule(objectives, [spec.probability for spec in specs], seed)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two stores, with documents longer than a bin, and their data section."""
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    stores = [
        write_store(folder / "a", [*rng.integers(1, 60, 150).tolist(), 150, 97], add_bos=True),
        write_store(folder / "b", rng.integers(5, 64, 40).tolist()),
    ]

    def data(**changes) -> DataSpec:
        epochs, weights = (changes.pop(key, (None, None)) for key in ("epochs", "weights"))
        sources = [
            SourceSpec(store=str(store.path), epochs=epoch, weight=weight)
            for store, epoch, weight in zip(stores, epochs, weights, strict=True)
        ]
        return DataSpec(sources=sources, **{"capacity": 64, "workers": 0, **changes})

    return stores, data


def make(
    world, *, micro=1, rank=0, size=1, state=None, schedule=None, seed=1, bins=GLOBAL, **changes
) -> ElasticLoader:
    stores, data = world
    stream = StreamSpec(
        stores=stores,
        data=data(**changes),
        schedule=schedule or schedule_of(),
        seed=seed,
        global_batch_bins=bins,
        vocabulary=TOKENS.vocabulary,
    )
    return ElasticLoader(stream, RankShare(rank=rank, world_size=size, micro_batch_bins=micro), state=state)


def consumed(loader: ElasticLoader, end: int):
    """What a consumer of all steps before `end` has added up."""
    total = loader.start_consumed
    for step in range(loader.start_step, end):
        total = total.plus(loader.step(step).counts)
    return total


def state_at(loader: ElasticLoader, step: int) -> dict:
    """The state of a consumer that stopped before `step`, as a checkpoint keeps it."""
    return json.loads(json.dumps(loader.state_dict(step, consumed(loader, step))))


def contents(batch) -> list[tuple]:
    """A batch as (name, visible tokens with positions, predictions) of each document: order and place left
    out.
    """
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
    rows = [
        cut(store.lengths, longest=64, overlong=spec.overlong, bos_id=bos_id)
        for store, bos_id in zip(stores, bos, strict=True)
    ]
    mixture = Mixture.of(spec.sources, [len(part) for part in rows], seed=1)
    stream = BinStream(rows, mixture, lambda lengths: lengths, spec, seed=1)
    counts = [Counter(), Counter()]
    total = sum(stream.num_bins(epoch) for epoch in range(epochs))
    assert stream.advance(Position(), total) == Position(epoch=epochs, bin=0)
    bins = stream.take(Position(), total)
    assert np.add.reduceat(bins.length, bins.offsets[:-1]).max() <= 64
    for source, store in enumerate(stores):
        tokens = rows[source].read(bins.row[bins.source == source], store, source=source).token_ids
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
    for step in range(per_epoch):  # GLOBAL whole epochs
        for batch in loader.step(step).batches:
            names.update(map(tuple, batch.documents.tolist()))
    assert set(names.values()) == {GLOBAL}


def test_bins_keep_their_mates_unless_repacked_and_change_their_order(world):
    def epochs(loader):
        """Two times GLOBAL epochs, so that both end with a whole step."""
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
    assert len(names["doubling"]) > len(names["ntp"])  # longer rows: more documents are split
    assert all(max(counter.values()) - min(counter.values()) <= 1 for counter in names.values())
    state = state_at(loader, 23)
    resumed = make(world, schedule=schedule, state=state, size=2, rank=1)
    whole = make(world, schedule=schedule, size=2, rank=1)
    for step in (23, 24, 40):
        assert [contents(b) for b in resumed.step(step).batches] == [
            contents(b) for b in whole.step(step).batches
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
    stores, data = world
    policy = WatchedPolicy(flash_from=20, tile_scores=60, tile_min_rows=2)
    stream = StreamSpec(
        stores=stores,
        data=data(workers=2),
        schedule=schedule_of(),
        seed=1,
        global_batch_bins=GLOBAL,
        vocabulary=TOKENS.vocabulary,
    )
    loader = ElasticLoader(stream, RankShare(layout_policy=policy))
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
    monkeypatch.setattr("bico_ds.data.plan_cache._BIG", 100)
    monkeypatch.setenv("SCRATCH_HERE", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    make(world, cache_dir="${SCRATCH_HERE}/cache").step(0)
    assert list((tmp_path / "scratch" / "cache" / "plans").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_an_indivisible_global_batch_is_refused_with_the_numbers_that_divide(world):
    with pytest.raises(UserError, match=r"global_batch_bins \(8\) must be .* ranks \(3\) = 3: choose 6 or 9"):
        make(world, size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, r"seed: 1 in the checkpoint, 2 now"),
        ({"max_documents_per_bin": 5}, r"data\.max_documents_per_bin: None in the checkpoint, 5 now"),
        ({"overlong": "drop"}, r"data\.overlong: split in the checkpoint, drop now"),
        ({"repack_every_epoch": True}, r"data\.repack_every_epoch: False in the checkpoint, True now"),
        ({"bins": 4}, r"training\.global_batch_bins: 8 in the checkpoint, 4 now"),
        ({"weights": (2.0, 1.0)}, r"data\.sources\[0\]\.weight: None in the checkpoint, 2\.0 now"),
        ({"epochs": (2.0, 1.0)}, r"data\.sources\[0\]\.epochs: None in the checkpoint, 2\.0 now"),
        (
            {"schedule": schedule_of([NtpSpec(kind="ntp")])},
            r"objectives\[1\]\.kind: bico in the checkpoint, \(not given\) now",
        ),
    ],
)
def test_a_changed_recipe_is_refused_naming_what_changed(world, change, message):
    state = state_at(make(world), 5)
    with pytest.raises(UserError, match=message):
        make(world, state=state, **change)
    with pytest.raises(UserError, match=r"--allow-data-change .*data\.allow_change: true"):
        make(world, state=state, **change)
    allowed = make(world, state=state, allow_change=True, **change)
    assert allowed.start_step == 5
    assert allowed.changes
    allowed.step(5)


class Tripling(DOUBLING.Doubling):
    """Another expansion, of which only the bins are looked at."""

    def expand(self, lengths):
        return 3 * lengths


def own_schedule(*names: str) -> ObjectiveSchedule:
    """Objectives of one, two and three times a document's tokens, in this order."""
    tripling = Tripling(spec=DOUBLING.DoublingSpec(shift=7), name="tripling")
    known = {o.name: o for o in build_objectives([NtpSpec(), DOUBLING.DoublingSpec()], TOKENS)}
    objectives = [(known | {"tripling": tripling})[name] for name in names]
    return ObjectiveSchedule(objectives, [1 / len(names)] * len(names), seed=1)


def next_bins(order: SampleOrder, name: str, begin: int) -> list:
    """The rows of this objective's next step."""
    batch = next(b for b in map(order.batch, range(begin, begin + 99)) if b.objective.name == name)
    return [batch.bins.source.tolist(), batch.bins.row.tolist(), batch.bins.passes.tolist()]


def order_of(world, *names: str, state=None, **changes) -> SampleOrder:
    stores, data = world
    spec = data(allow_change=state is not None, **changes)
    stream = StreamSpec(
        stores=stores,
        data=spec,
        schedule=own_schedule(*names),
        seed=1,
        global_batch_bins=GLOBAL,
        vocabulary=TOKENS.vocabulary,
    )
    return SampleOrder(stream, state)


@pytest.mark.parametrize("known", [True, False], ids=["cursors with owners", "cursors without"])
@pytest.mark.parametrize(
    "now",
    [
        ("ntp", "doubling"),
        ("doubling",),
        ("ntp",),
        ("doubling", "ntp"),
        ("tripling", "doubling", "ntp"),
        ("tripling", "doubling"),
    ],
    ids=" ".join,
)
def test_a_stream_that_did_not_change_goes_on_where_it_stood_wherever_it_stands_in_the_recipe(
    world, now, known
):
    before = order_of(world, "ntp", "doubling")
    state = before.state_dict(23, before.start_consumed)
    assert state["cursor_of"] == [0, 1]
    assert state["cursors"][0] != state["cursors"][1]
    if not known:
        del state["cursor_of"]
    after = order_of(world, *now, state=state)
    for name in {"ntp", "doubling"} & set(now):
        assert next_bins(after, name, 23) == next_bins(before, name, 23)


def test_a_stream_that_no_cursor_is_left_for_begins_at_its_beginning(world):
    before = order_of(world, "ntp", "doubling")
    state = before.state_dict(23, before.start_consumed)
    after = order_of(world, "tripling", "doubling", "ntp", state=state)
    assert next_bins(after, "tripling", 23) == next_bins(order_of(world, "tripling"), "tripling", 0)


@pytest.mark.parametrize(
    "now", [("ntp", "doubling"), ("doubling", "ntp"), ("doubling",), ("tripling", "ntp")]
)
def test_a_stream_that_changed_goes_on_at_the_same_epoch_and_bin(world, now):
    before = order_of(world, "ntp", "doubling")
    state = before.state_dict(5, before.start_consumed)
    ntp, doubling = ({k: cursor[k] for k in ("epoch", "bins_consumed")} for cursor in state["cursors"])
    assert ntp != doubling
    cursors = order_of(world, *now, state=state, capacity=128).state_dict(5, before.start_consumed)["cursors"]
    expected = [ntp if name == "ntp" else doubling for name in now]  # the tripled one takes what is left over
    assert [{k: cursor[k] for k in ("epoch", "bins_consumed")} for cursor in cursors] == expected


def test_plans_that_are_equal_by_chance_are_told_apart_by_their_objectives(tmp_path):
    """One document per bin, however it is expanded."""
    store = write_store(tmp_path / "alike", [20] * 50)
    alike = (
        [store],
        lambda **changes: DataSpec(
            sources=[SourceSpec(store=str(store.path))],
            capacity=64,
            max_documents_per_bin=1,
            workers=0,
            **changes,
        ),
    )
    before = order_of(alike, "ntp", "doubling")
    state = before.state_dict(5, before.start_consumed)
    assert state["cursors"][0]["plan"] == state["cursors"][1]["plan"]
    for now in (("doubling",), ("doubling", "ntp"), ("tripling", "doubling", "ntp")):
        after = order_of(alike, *now, state=state)
        assert next_bins(after, "doubling", 5) == next_bins(before, "doubling", 5)


def test_an_objective_that_leaves_its_stream_without_a_new_identity_is_refused(world):
    """Its code changed: the same recipe has another number of streams."""
    before = order_of(world, "ntp", "doubling")
    state = before.state_dict(5, before.start_consumed)
    with pytest.raises(UserError, match="the pack plan: same data and recipe"):
        make(
            world, schedule=own_schedule("ntp", "doubling"), state={**state, "cursors": state["cursors"][:1]}
        )


def test_changed_data_is_refused(world, tmp_path):
    stores, data = world
    state = state_at(make(world), 5)
    other = write_store(tmp_path / "b", [9] * 40)
    with pytest.raises(UserError, match=r"data\.sources\[1\] contents"):
        make(([stores[0], other], data), state=state)


class Own(NextTokenPrediction):
    """An objective with one part of its own."""

    def __init__(self, **parts):
        super().__init__(spec=NtpSpec(), name="own")
        for name, part in parts.items():
            object.__setattr__(self, name, part)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"identity": lambda: ["own", 1]},
            r"objective 'own': its identity\(\) must be a mapping .* \['own', 1\]",
        ),
        ({"identity": lambda: None}, r"objective 'own': its identity\(\) must be a mapping .* found None"),
        ({"identity": lambda: {"ids": np.int64(3)}}, r"objective 'own': its identity\(\) is not JSON"),
        (
            {"identity": lambda: {"rate": float("nan")}},
            r"objective 'own': its identity\(\) is not JSON: NaN equals nothing",
        ),
        (
            {"expand": lambda lengths: lengths * 1.5},
            r"objective 'own': expand\(\) must give whole .* got float64",
        ),
        (
            {"expand": lambda lengths: lengths[:3]},
            r"objective 'own': expand\(\) must give .* of shape \(3,\) for 64",
        ),
        (
            {"expand": lambda lengths: lengths // 2},
            r"objective 'own': expand\(\) must give whole numbers of at least 1",
        ),
    ],
)
def test_an_objective_of_the_users_own_is_held_to_its_contract_before_anything_is_trained(
    world, parts, message
):
    with pytest.raises(UserError, match=message):
        make(world, schedule=ObjectiveSchedule([Own(**parts)], [1.0], seed=1))


def test_an_objective_that_builds_more_than_it_promised_is_named(world):
    own = Own(expand=lambda lengths: (lengths + 1) // 2)
    loader = make(world, schedule=ObjectiveSchedule([own], [1.0], seed=1))
    with pytest.raises(UserError, match=r"objective 'own'.* rows, where its expand\(\) promised at most"):
        loader.step(0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b: {"loss_rows": b.loss_rows + b.plan.num_rows}, r"its loss_rows has \d+, past the rows: at most \d+"),
        (lambda b: {"loss_rows": b.loss_rows - b.plan.num_rows}, r"its loss_rows has -\d+, and must not be negative"),
        (lambda b: {"loss_rows": b.loss_rows[1:]}, r"its loss_rows must be .* of shape \(\d+,\), and is torch\.int64 of"),
        (lambda b: {"targets": b.targets + 100_000}, r"its targets has \d+, past the vocabulary: at most 99999"),
        (lambda b: {"targets": torch.full_like(b.targets, -100)}, r"its targets has -100, and must not be negative"),
        (lambda b: {"targets": b.targets.int()}, r"its targets must be .*, and is torch\.int32 of shape"),
        (lambda b: {"input_ids": b.input_ids + 100_000}, r"its input_ids has \d+, past the vocabulary: at most 99999"),
        (lambda b: {"input_ids": b.input_ids[1:]}, r"its input_ids must be .* of shape"),
        (lambda b: {"position_ids": b.position_ids.numpy()}, r"its position_ids must be a tensor, .*, and is int64 of"),
        (lambda b: {"position_ids": b.position_ids - 1}, r"its position_ids has -1, and must not be negative"),
        (lambda b: {"represented_tokens": 0}, r"its represented_tokens is 0: it counts the documents' own tokens"),
        (lambda b: {"represented_tokens": 9999}, r"its represented_tokens is 9999: .*, here up to \d+"),
        (lambda b: {"documents": b.documents[:, :2]}, r"its documents must be .* of shape \(\d+, 3\), and is"),
        (lambda b: None, r"its build\(\) returned no PackedBatch, but NoneType"),
    ],
)  # fmt: skip
def test_a_batch_that_no_model_can_read_is_refused_where_it_is_built(world, broken, message):
    class Broken(NextTokenPrediction):
        def build(self, documents, key):
            batch = super().build(documents, key)
            changed = broken(batch)
            return None if changed is None else replace(batch, **changed)

    schedule = ObjectiveSchedule([Broken(spec=NtpSpec(), name="broken")], [1.0], seed=1)
    loader = make(world, schedule=schedule, workers=1)
    with pytest.raises(
        UserError, match=rf"step 0, objective 'broken': .*document \d+ .* of source '[ab]'.*{message}"
    ):
        loader.step(0)
    loader.close()


def test_an_identity_with_tuples_is_the_one_that_a_checkpoint_gives_back(world):
    schedule = ObjectiveSchedule([Own(identity=lambda: {"special_ids": (1, 2), "mask": {}})], [1.0], seed=1)
    state = state_at(make(world, schedule=schedule), 3)
    assert make(world, schedule=schedule, state=state).changes == []


def test_an_empty_mapping_is_a_value_too():
    assert identity.changes({"a": {"kind": "x"}}, {"a": {"kind": "x", "mask": {}}}) == [
        "a.mask: (not given) in the checkpoint, {} now"
    ]
    assert identity.changes({"a": {"b": 1}}, {"a": {}})


def test_a_failing_document_is_named_from_the_worker(world):
    class Failing(NextTokenPrediction):
        def build(self, documents, key):
            if ((documents.source == 1) & (documents.id == 17)).any():
                raise KeyError("boom")
            return super().build(documents, key)

    schedule = ObjectiveSchedule([Failing(spec=NtpSpec(), name="failing")], [1.0], seed=1)
    loader = make(world, schedule=schedule, workers=1)
    with pytest.raises(
        RuntimeError, match=r"step \d+, objective 'failing'.*document 17 \(piece 0\) of source 'b'.*boom"
    ):
        [loader.step(step) for step in range(20)]
    loader.close()


def test_a_mask_policy_that_the_store_cannot_serve_is_refused_at_once(world):
    entities = schedule_of([BicoSpec(kind="bico", mask=MaskSpec(unit="entity"))])
    with pytest.raises(UserError, match="no entity spans"):
        make(world, schedule=entities)


def test_the_source_that_a_mask_policy_cannot_be_served_by_is_named(tmp_path):
    stores = [write_store(tmp_path / name, [9] * 40, has_entities=name == "has") for name in ("has", "lacks")]
    data = DataSpec(sources=[SourceSpec(store=str(s.path)) for s in stores], capacity=64, workers=0)
    entities = schedule_of([BicoSpec(kind="bico", mask=MaskSpec(unit="entity"))])
    with pytest.raises(UserError, match=r"source 'lacks': .*no entity spans"):
        make((stores, lambda: data), schedule=entities)


def test_a_source_with_nothing_to_train_on_is_named(tmp_path):
    store = write_store(tmp_path / "long", [500, 600])
    data = DataSpec(sources=[SourceSpec(store="x/long")], capacity=64, overlong="drop", workers=0)
    with pytest.raises(UserError, match=r"source 'long' has nothing to train on"):
        make(([store], lambda: data))


def test_a_state_of_another_version_is_refused(world):
    with pytest.raises(UserError, match="version 99"):
        make(world, state={**state_at(make(world), 3), "version": 99})
