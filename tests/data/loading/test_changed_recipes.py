"""A resume after a change: refused naming what changed, or allowed, and then every stream goes on where it stood."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading import identity
from bico_ds.data.loading.sample_order import SampleOrder
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.data.loading.loaders import DOUBLING, TOKENS, make, schedule_of, state_at, stream_of
from tests.data.stores import write_store


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
    """The sequences of this objective's next step."""
    batch = next(b for b in map(order.batch, range(begin, begin + 99)) if b.objective.name == name)
    return [batch.bins.source.tolist(), batch.bins.sequence.tolist(), batch.bins.passes.tolist()]


def order_of(world, *names: str, state=None, **changes) -> SampleOrder:
    changes["allow_change"] = state is not None
    return SampleOrder(stream_of(world, schedule=own_schedule(*names), **changes), state)


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


def test_an_empty_mapping_is_a_value_too():
    assert identity.changes({"a": {"kind": "x"}}, {"a": {"kind": "x", "mask": {}}}) == [
        "a.mask: (not given) in the checkpoint, {} now"
    ]
    assert identity.changes({"a": {"b": 1}}, {"a": {}})


def test_a_state_of_another_version_is_refused(world):
    with pytest.raises(UserError, match="version 99"):
        make(world, state={**state_at(make(world), 3), "version": 99})
