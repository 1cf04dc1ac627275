"""A second objective of a kind draws masks of its own; the first one, and runs of before, draw as they always did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.table import numbers_in_kind
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from tests.data.loading.loaders import schedule_of, state_at, stream_of

MASK = MaskSpec(rate=0.5)
SPECS = [
    BicoSpec(probability=0.4, mask=MASK),
    NtpSpec(probability=0.2),
    BicoSpec(probability=0.4, mask=MASK),
]
EPOCH = 40  # steps in which each objective begins its second pass


@pytest.fixture
def alike(world) -> StreamSpec:
    """All have cursors of their own, and both of one kind read the first store; nothing tells their draws apart."""
    seed = int(np.random.default_rng().integers(2**31))
    stream = stream_of(world, schedule=schedule_of(SPECS, seed), seed=seed)
    return replace(stream, sources_of=[(0, 1), (1,), (0,)])


@pytest.fixture
def apart(alike) -> StreamSpec:
    return replace(alike, draws=numbers_in_kind(SPECS))


def loader_of(stream: StreamSpec, state=None) -> ElasticLoader:
    return ElasticLoader(stream, RankShare(), state=state)


def predicted(stream: StreamSpec, *, state=None) -> dict[str, dict[tuple[int, ...], set[tuple[int, ...]]]]:
    """By objective and document, the positions whose outputs have a loss, each time that it is read."""
    loader, found = loader_of(stream, state), {}
    for step in range(loader.start_step, loader.start_step + EPOCH):
        drawn = loader.step(step)
        for batch in drawn.batches:
            kept = np.repeat(np.arange(batch.plan.num_documents), batch.plan.cu_seqlens.diff().numpy())
            document = np.concatenate([kept, batch.plan.live_document.numpy()])[batch.loss_rows.numpy()]
            for number, name in enumerate(map(tuple, batch.documents.tolist())):
                rows = batch.loss_rows.numpy()[document == number]
                where = tuple(sorted(batch.position_ids.numpy()[rows].tolist()))
                found.setdefault(drawn.objective, {}).setdefault(name, set()).add(where)
    return found


def share_of_same(first: dict, second: dict) -> float:
    """Of the documents that both have, long enough for chance to tell them apart: those with a mask in common."""
    long = [name for name in first if name in second and min(map(len, first[name] | second[name])) > 8]
    assert len(long) > 20
    return sum(bool(first[name] & second[name]) for name in long) / len(long)


def test_a_second_objective_of_a_kind_draws_other_masks_and_the_first_those_of_before(alike, apart):
    before, now = predicted(alike), predicted(apart)
    assert share_of_same(before["bico"], before["bico_2"]) == 1.0  # what is told apart
    assert share_of_same(now["bico"], now["bico_2"]) < 0.05
    assert now["bico"] == before["bico"] and now["ntp"] == before["ntp"]


def test_a_run_of_before_goes_on_with_the_masks_it_began_with_resumed_however_often(alike, apart):
    state = state_at(loader_of(alike), 5)
    resumed = loader_of(apart, state)
    assert resumed.changes == []
    again = state_at(resumed, 7)
    assert predicted(apart, state=again) == predicted(alike, state=again)


def test_a_run_that_draws_apart_resumes_apart_and_its_checkpoint_says_so(alike, apart):
    state = state_at(loader_of(apart), 5)
    assert state["identity"]["objectives[2].draws"] == 1
    resumed, whole = loader_of(apart, state), loader_of(apart)
    for step in range(5, 15):
        pairs = zip(resumed.step(step).batches, whole.step(step).batches, strict=True)
        assert all(ours.targets.equal(theirs.targets) for ours, theirs in pairs)
    with pytest.raises(UserError, match=r"objectives\[2\]\.draws: 1 in the checkpoint, \(not given\) now"):
        loader_of(alike, state)


def test_an_objective_that_joins_one_that_goes_on_draws_otherwise(alike):
    """Put before it, it is the first of the kind, whose number the other one has."""
    specs = [NtpSpec(probability=0.6), BicoSpec(probability=0.4, mask=MASK)]
    began = replace(alike, schedule=schedule_of(specs, alike.seed), sources_of=[(1,), (0,)])
    state = state_at(loader_of(began), 5)
    joined = [BicoSpec(probability=0.6, mask=MASK), BicoSpec(probability=0.4, mask=MASK)]
    schedule, data = schedule_of(joined, alike.seed), alike.data.model_copy(update={"allow_change": True})
    both = replace(
        alike, schedule=schedule, sources_of=[(0, 1), (0,)], draws=numbers_in_kind(joined), data=data
    )
    found = predicted(both, state=state)
    assert share_of_same(found["bico"], found["bico_2"]) < 0.05
    goes_on = predicted(began, state=state)["bico"]
    assert share_of_same(goes_on, found["bico_2"]) == 1.0


def test_kinds_are_counted_apart():
    assert numbers_in_kind([*SPECS, NtpSpec(), BicoSpec()]) == [0, 0, 1, 1, 2]
