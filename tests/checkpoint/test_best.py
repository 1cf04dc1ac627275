"""Which checkpoint is the best, and what is kept, recorded and forgotten of it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bico_ds.checkpoint import best, manifest
from bico_ds.checkpoint.best import BestCheckpoint, BestKeeper
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.common.errors import UserError
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.config.sections.keep_best import KeepBestSpec
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder

RANKS = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
LEAST = KeepBestSpec(metric="held_out/mine/ntp", mode="min")
MOST = KeepBestSpec(metric="n2d/headline", mode="max")


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.open()
    yield folder
    folder.close()


def checkpoint(folder: RunFolder, step: int) -> None:
    path = folder.checkpoints / manifest.name_of(step)
    path.mkdir(parents=True)
    manifest.write_manifest(path, {"step": step, "files": {}})


def step_kept(folder: RunFolder) -> int | None:
    kept = best.read(folder)
    return None if kept is None else kept.step


def steps_in(folder: RunFolder) -> list[int]:
    return [manifest.step_of(path) for path in manifest.checkpoints_in(folder.checkpoints)]


class Evaluated:
    """A run of checkpoints and evaluations alone; killed, it goes on from what its last checkpoint records."""

    def __init__(self, folder: RunFolder, spec: KeepBestSpec | None, **keeping: int) -> None:
        self.folder, self.spec, self.keeping = folder, spec, keeping
        self.go_on(None)

    def go_on(self, saved: dict | None) -> str | None:
        keeper = BestKeeper(self.spec, self.folder, RANKS, saved=saved)
        spec = CheckpointSpec(keep_best=self.spec, **self.keeping)
        self.saves = Checkpointer(spec, self.folder, RANKS, exclude_frozen=False, header={}, best=keeper)
        return keeper.begin()

    def step(self, step: int, value: float) -> bool:
        """An evaluation, with a checkpoint where it is the best; returns whether it is."""
        assert self.spec is not None
        found = self.saves.best.better(step, {f"evaluation/{self.spec.metric}": value})
        if found is None:
            return False
        if not self.saves.best.has(step):
            self.save(step)
        assert self.saves.keep_best(found) is None
        return True

    def save(self, step: int) -> None:
        checkpoint(self.folder, step)
        self.saves._prune()


@pytest.mark.parametrize("spec", [LEAST, MOST])
def test_the_best_of_drawn_values_is_kept_and_the_earlier_of_equal_ones(folder, spec):
    values = [random.choice([0.25, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf]) for _ in range(12)]
    run = Evaluated(folder, spec, keep_last=2)
    for number, value in enumerate(values, start=1):
        run.step(number, value)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert best.read(folder) is None
        return
    extreme = (max if spec.mode == "max" else min)(finite)
    expected = values.index(extreme) + 1
    assert best.read(folder) == BestCheckpoint(
        step=expected, metric=spec.metric, mode=spec.mode, value=extreme
    )
    assert (folder.checkpoints / "best").read_text() == manifest.name_of(expected) + "\n"
    assert expected in steps_in(folder)
    assert len(steps_in(folder)) <= 2


@pytest.mark.parametrize(("spec", "kept"), [(MOST, 30), (LEAST, 10)])
def test_of_scores_of_zero_the_later_is_kept_and_of_losses_the_earlier(folder, spec, kept):
    run = Evaluated(folder, spec)
    for step in (10, 20, 30):
        run.step(step, 0.0)
    assert step_kept(folder) == kept


def test_the_best_stays_beside_the_last_ones_until_a_better_one_comes(folder):
    run = Evaluated(folder, MOST, keep_last=2)
    assert run.step(1, 0.5)
    for step in (2, 3, 4):
        run.save(step)
        assert not run.step(step, 0.5)
    assert steps_in(folder) == [1, 3, 4]
    assert run.step(4, 0.6)
    assert steps_in(folder) == [3, 4], "nothing keeps the first one any more"


def test_what_a_checkpoint_records_is_taken_over_where_its_best_is_here(folder):
    run = Evaluated(folder, LEAST, keep_last=1)
    run.step(1, 3.0)
    saved = json.loads(json.dumps(run.saves.best.state()))
    run.save(2)
    best.write(folder, None)  # killed before the record was written
    assert run.go_on(saved) is None
    assert best.read(folder) == run.saves.best.best
    assert step_kept(folder) == 1
    assert not run.step(2, 3.0)


def test_a_later_record_does_not_survive_a_start_from_an_earlier_checkpoint(folder):
    run = Evaluated(folder, LEAST, keep_last=3)
    run.step(1, 3.0)
    saved = run.saves.best.state()
    run.step(2, 1.0)
    run.go_on(saved)
    assert step_kept(folder) == 1
    run.go_on(None)
    assert best.read(folder) is None
    assert not (folder.checkpoints / "best").exists()


def test_a_best_whose_checkpoint_is_gone_or_of_another_metric_is_told_and_looked_for_anew(folder):
    saved = {"step": 7, "metric": LEAST.metric, "mode": "min", "value": 0.5}
    run = Evaluated(folder, LEAST)
    told = run.go_on(saved)
    assert told is not None
    assert "step 7, held_out/mine/ntp 0.5 (min), and its checkpoint is not here any more" in told
    assert run.step(8, 9.0)
    checkpoint(folder, 7)
    run.spec = MOST
    told = run.go_on(saved)
    assert told is not None
    assert "checkpoint.keep_best goes by n2d/headline now" in told
    assert run.step(9, 0.1)


def test_without_keep_best_nothing_is_recorded_and_an_earlier_record_goes(folder):
    run = Evaluated(folder, LEAST)
    run.step(1, 3.0)
    run.spec = None
    run.go_on(run.saves.best.state())
    assert best.read(folder) is None
    assert run.saves.best.better(2, {"evaluation/held_out/mine/ntp": 1.0}) is None
    assert run.saves.best.state() is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"step": 1}', '{"step": -1, "metric": "a", "mode": "min", "value": 1}']
)
def test_a_damaged_record_is_a_message_that_names_it(folder, content):
    folder.best_checkpoint_file.write_text(content)
    with pytest.raises(UserError, match=r"best_checkpoint\.json: damaged"):
        best.read(folder)


def test_a_record_that_cannot_be_written_is_told_and_ends_no_run(folder):
    folder.best_checkpoint_file.mkdir()
    run = Evaluated(folder, LEAST)
    checkpoint(folder, 1)
    found = run.saves.best.better(1, {"evaluation/held_out/mine/ntp": 1.0})
    assert found is not None
    failure = run.saves.keep_best(found)
    assert failure is not None
    assert "best_checkpoint.json" in failure
    assert run.saves.best.best == found


def keeper_of(folder: RunFolder, measured_on: str | None, saved: dict | None = None) -> BestKeeper:
    return BestKeeper(LEAST, folder, RANKS, saved=saved, measured_on=measured_on)


def test_a_best_that_was_measured_on_something_else_is_told_and_not_compared(folder):
    """A run that goes on with other questions: the old score may never be reached again."""
    checkpoint(folder, 1)
    first = keeper_of(folder, "old questions")
    first.begin()
    found = first.better(1, {"evaluation/held_out/mine/ntp": 0.5})
    assert found is not None
    saved = json.loads(json.dumps(first.state(found)))
    same = keeper_of(folder, "old questions", saved)
    assert same.begin() is None
    assert same.best == found
    other = keeper_of(folder, "new questions", saved)
    told = other.begin()
    assert told is not None
    assert "step 1, held_out/mine/ntp 0.5 (min); what this is measured on was changed since" in told
    assert other.is_remeasured, "its evaluation of the step itself is of the old questions, too"
    assert other.better(2, {"evaluation/held_out/mine/ntp": 9.0}) is not None
    assert best.read(folder) is None


def test_a_checkpoint_before_the_first_best_records_what_is_measured_on_and_an_older_one_need_not(folder):
    saved = keeper_of(folder, "old questions").state()
    assert keeper_of(folder, "new questions", saved).is_remeasured
    assert not keeper_of(folder, "old questions", saved).is_remeasured
    checkpoint(folder, 1)
    older = {"step": 1, "metric": LEAST.metric, "mode": "min", "value": 0.5}
    keeper = keeper_of(folder, "new questions", older)
    assert keeper.begin() is None
    assert keeper.best == BestCheckpoint(step=1, metric=LEAST.metric, mode="min", value=0.5)


def test_the_checkpoint_that_the_record_names_stays_until_another_is_recorded(folder, monkeypatch):
    """A disk that is full for a moment: `bico-ds export` goes by the record, and must find what it names."""
    run = Evaluated(folder, MOST, keep_last=1)
    assert run.step(1, 0.5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(folder.best_checkpoint_file))

    with monkeypatch.context() as patch:
        patch.setattr(best, "write_atomically", full)
        checkpoint(folder, 2)
        found = run.saves.best.better(2, {"evaluation/n2d/headline": 0.6})
        assert found is not None
        assert run.saves.keep_best(found) is not None
    run.save(3)
    assert step_kept(folder) == 1
    assert steps_in(folder) == [1, 2, 3]
    assert run.step(4, 0.7)
    assert step_kept(folder) == 4
    assert steps_in(folder) == [4]
