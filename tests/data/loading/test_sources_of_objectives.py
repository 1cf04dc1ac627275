"""Objectives limited to sources: what each step draws, in which shares, how often, at any ranks, after a resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import Consumed, SampleOrder, StreamSpec
from tests.data.loading.loaders import TOKENS, consumed, schedule_of, state_at
from tests.data.stores import EOS, write_store

FACTS, REPLAY = 0, 1
NTP_AND_BICO = [NtpSpec(probability=0.4), BicoSpec(probability=0.6)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Short facts, and a few long documents, of which many are longer than a bin."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng()
    return [
        write_store(folder / "facts", rng.integers(3, 30, 400).tolist()),
        write_store(folder / "replay", rng.integers(100, 900, 60).tolist()),
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The same kinds of documents, of which an epoch takes enough for their mean to be that of all."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng()
    return [
        write_store(folder / "facts", rng.integers(3, 30, 4000).tolist()),
        write_store(folder / "replay", rng.integers(100, 900, 300).tolist()),
    ]


def stream(stores, *, shares=(None, 0.25), sources_of=((0, 1), (0,)), seed=1, bins=8, **data) -> StreamSpec:
    sources = [
        SourceSpec(store=str(store.path), token_share=share, name=name)
        for store, share, name in zip(stores, shares, ("facts", "replay"), strict=True)
    ]
    return StreamSpec(
        stores=stores,
        data=DataSpec(sources=sources, capacity=256, workers=0, **data),
        schedule=schedule_of(NTP_AND_BICO, seed),
        seed=seed,
        global_batch_bins=bins,
        vocabulary=TOKENS.vocabulary,
        sources_of=sources_of,
    )


def test_a_step_holds_no_document_of_a_source_that_its_objective_has_not(stores):
    seen = {"ntp": set(), "bico": set()}
    for seed in np.random.default_rng().integers(2**31, size=8).tolist():
        spec = stream(stores, seed=seed, bins=2)
        loader = ElasticLoader(spec, RankShare(micro_batch_bins=2))
        for step in range(10):
            drawn = loader.step(step)
            for batch in drawn.batches:
                seen[drawn.objective] |= {*batch.documents[:, 0].tolist()}
            assert drawn.objective == "ntp" or drawn.counts[REPLAY].tolist() == [0, 0]
    assert seen == {"ntp": {FACTS, REPLAY}, "bico": {FACTS}}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_token_share_is_of_the_tokens_of_the_steps_whose_objective_has_the_source(many, share):
    """Tokens are counted piece by piece; an epoch takes whole pieces, so few of them miss the share by a few percent."""
    order = SampleOrder(stream(many, shares=(None, share), bins=32))
    tokens = {"ntp": np.zeros(2), "bico": np.zeros(2)}
    # Whole passes over the replay, of which a part would have longer or shorter documents than the rest.
    end = order.total_steps(3, source=REPLAY)
    for batch in map(order.batch, range(end)):
        for source in (FACTS, REPLAY):
            numbers = batch.bins.sequence[batch.bins.source == source]
            tokens[batch.objective.name][source] += batch.sequences[source].length[numbers].sum()
    assert tokens["ntp"][REPLAY] / tokens["ntp"].sum() == pytest.approx(share, rel=0.01)
    assert tokens["bico"][REPLAY] == 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_shares_that_are_reported_of_a_first_epoch_are_those_of_the_recipe(many, share):
    """On average: the pieces of one epoch are longer or shorter than those of all."""
    found = []
    for seed in np.random.default_rng().integers(2**31, size=5).tolist():
        reports = SampleOrder(stream(many, shares=(None, share), seed=seed)).report()
        (ntp,) = (report.shares for report in reports if report.objectives == ("ntp",))
        assert sum(ntp.values()) == pytest.approx(1)
        found.append(ntp["replay"])
    assert np.mean(found) == pytest.approx(share, abs=0.02)


def test_shares_of_all_sources_are_relative_to_each_other(many):
    shares = {r.objectives: r.shares for r in SampleOrder(stream(many, shares=(0.2, 0.6))).report()}
    assert shares["ntp",]["replay"] == pytest.approx(0.75, rel=0.01)
    assert shares["bico",] == {"facts": 1.0}


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_no_sequence_is_seen_again_before_all_of_its_source_were_seen(stores, share):
    """Per stream, over epochs of which none holds whole passes; bins of an epoch come in a drawn order."""
    order = SampleOrder(stream(stores, shares=(None, share), bins=1))
    seen: dict[str, list[tuple[int, int, int]]] = {"ntp": [], "bico": []}
    for batch in map(order.batch, range(order.total_steps(3))):
        bins = batch.bins
        seen[batch.objective.name] += zip(
            bins.source.tolist(), bins.sequence.tolist(), bins.passes.tolist(), strict=True
        )
    for entries in seen.values():
        assert len({*entries}) == len(entries), "no pass has a sequence twice"
        for source in {source for source, _, _ in entries}:
            sizes = Counter(number for of, _, number in entries if of == source)
            complete = len(order.sequences_of(0)[source])
            # The stream stops within an epoch, and an epoch's bins of several passes are in a drawn order.
            assert all(sizes[number] == complete for number in range(max(sizes) - 6)), (source, sizes)


def names(stream_spec: StreamSpec, step: int, *, world_size: int = 1, state=None) -> list:
    """The documents of a global batch, over all ranks."""
    found = []
    for rank in range(world_size):
        loader = ElasticLoader(stream_spec, RankShare(rank=rank, world_size=world_size), state=state)
        found += [tuple(name) for batch in loader.step(step).batches for name in batch.documents.tolist()]
    return sorted(found)


def test_the_global_stream_is_the_same_at_any_ranks_and_from_any_step(stores):
    spec = stream(stores)
    stop = int(np.random.default_rng().integers(1, 12))
    begin = ElasticLoader(spec, RankShare())
    state = state_at(begin, stop)
    assert len(state["cursors"]) == 2
    for step in (stop, stop + 5):
        expected = names(spec, step)
        for world_size in (1, 2, 4):
            assert names(spec, step, world_size=world_size, state=state) == expected


def test_a_resume_with_other_sources_or_shares_is_refused_naming_the_key(stores):
    order = SampleOrder(stream(stores))
    state = order.state_dict(3, order.start_consumed)
    for change, key in (
        ({"sources_of": ((0, 1), (0, 1))}, r"objectives\[1\]\.sources: \[0\] in the checkpoint, \(not given\) now"),
        ({"sources_of": ((1,), (0,))}, r"objectives\[0\]\.sources: \(not given\) in the checkpoint, \[1\] now"),
        ({"shares": (None, 0.5)}, r"data\.sources\[1\]\.token_share: 0\.25 in the checkpoint, 0\.5 now"),
        ({"shares": (None, None)}, r"data\.sources\[1\]\.token_share: 0\.25 in the checkpoint, \(not given\) now"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=key):
            SampleOrder(stream(stores, **change), state)
        allowed = SampleOrder(stream(stores, allow_change=True, **change), state)
        assert len(allowed.changes) == 1
        assert allowed.batch(3).counts.sum() > 0


def test_a_run_without_limits_keeps_the_identity_of_checkpoints_that_knew_none(stores):
    named = SampleOrder(stream(stores, shares=(None, None), sources_of=((0, 1), (0, 1))))
    before = SampleOrder(stream(stores, shares=(None, None), sources_of=None))
    state = before.state_dict(7, before.start_consumed)
    assert SampleOrder(stream(stores, shares=(None, None), sources_of=((0, 1), (0, 1))), state).changes == []
    assert named.state_dict(7, named.start_consumed) == state
    assert not any("token_share" in key or "].sources" in key for key in state["identity"])


def test_counters_are_of_each_source_whatever_stream_it_came_by(stores):
    loader = ElasticLoader(stream(stores), RankShare())
    end, expected = 8, Counter()
    for step in range(end):
        for batch in loader.step(step).batches:
            expected.update(batch.documents[:, 0].tolist())
    total: Consumed = consumed(loader, end)
    assert total.counts[:, 0].tolist() == [expected[FACTS], expected[REPLAY]]


@pytest.mark.parametrize(("source", "passes"), [(FACTS, 7.3), (REPLAY, 0.8)])
def test_epochs_of_a_source_end_at_the_first_step_that_completes_its_passes(many, source, passes):
    """All objectives together, by the steps that are drawn. Measured: off as far as epochs differ in bins.

    A run is off by 1.2 % (standard deviation), since it ends within an epoch: the mean of several is judged.
    """
    taken = []
    for seed in np.random.default_rng().integers(2**31, size=5).tolist():
        spec = stream(many, seed=seed, bins=16)
        order = SampleOrder(spec)
        end = order.total_steps(passes, source=source)
        rates = {
            r.objectives[0]: 16 * r.passes.get(("facts", "replay")[source], 0) / r.bins
            for r in order.report()
        }
        walked = np.cumsum([rates[spec.schedule(step).name] for step in range(end)])
        assert walked[-2] < passes <= walked[-1]
        sequences = sum(order.batch(step).counts[source, 0] for step in range(end))
        taken.append(sequences / len(order.sequences_of(0)[source]))
    assert np.mean(taken) == pytest.approx(passes, rel=0.03)


def test_a_source_is_checked_for_the_objectives_that_have_it_alone(tmp_path):
    """Texts of stop tokens, which next-token prediction learns from and BICO never does."""
    facts = write_store(tmp_path / "facts", [20] * 40)
    stops = write_store(tmp_path / "stops", [5] * 40, tokens=np.full(200, EOS))

    def warnings(sources_of) -> list[str]:
        spec = stream([facts, stops], shares=(None, None), sources_of=sources_of)
        return ElasticLoader(spec, RankShare()).check_targets()

    with pytest.raises(UserError, match=r"source 'replay': 40 of 40 .* objectives\[1\] \(bico\)"):
        warnings(((0, 1), (0, 1)))
    assert not any("source 'replay'" in line for line in warnings(((0, 1), (0,))))
