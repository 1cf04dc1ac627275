"""What the loader holds an objective to: its identity, its expansion, its batches, and the stores that it can serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.data.loading.loaders import make, schedule_of, state_at
from tests.data.stores import write_store


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
        (lambda b: {"loss_weights": torch.ones(len(b.targets) + 1)}, r"its loss_weights must be .*float32 of shape"),
        (lambda b: {"loss_weights": torch.ones(len(b.targets)).double()}, r"its loss_weights must be .* is torch\.float64"),
        (lambda b: {"loss_weights": torch.zeros(len(b.targets))}, r"its loss_weights has 0: weights must be positive"),
        (lambda b: {"loss_weights": torch.full((len(b.targets),), -1.0)}, r"its loss_weights has -1: weights must be"),
        (lambda b: {"loss_weights": torch.full((len(b.targets),), torch.nan)}, r"its loss_weights has nan: weights"),
        (lambda b: {"loss_weights": torch.full((len(b.targets),), torch.inf)}, r"its loss_weights has inf: weights"),
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
