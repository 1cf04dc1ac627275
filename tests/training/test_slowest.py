"""The slowest rank: what each rank tells of its own time, what is made of it, and when a rank is called slow."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import Work
from torch.testing._internal.distributed import multi_threaded_pg

from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.nodes.own_time import OwnTime
from bico_ds.runtime.nodes.slow_rank import FACTOR_TAG, INTERVALS, RANK_TAG, SECONDS_TAG, SLOW
from bico_ds.training.callbacks import slowest
from bico_ds.training.callbacks.slowest import SlowestRank
from bico_ds.training.step_totals import add_up
from tests.distributed.test_many_ranks import on_threads
from tests.training.test_step_totals import run_of

RANKS = 4


class Told:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def callback(monkeypatch, *, ranks: int = RANKS, folder: Any = None) -> tuple[SlowestRank, Told]:
    told = Told()
    this = Ranks(rank=0, local_rank=0, world_size=ranks, device=torch.device("cpu"))
    found = SlowestRank(this, folder or SimpleNamespace(add_to_start=lambda **facts: None), told)  # type: ignore[arg-type]
    monkeypatch.setattr(slowest, "all_gather_objects", lambda name: [f"n{rank}" for rank in range(ranks)])
    found.on_start(None)  # type: ignore[arg-type]
    return found, told


def interval(*own: list[float], step: int = 1) -> Any:
    return [SimpleNamespace(step=step, own_seconds=seconds) for seconds in own]


def test_the_slowest_of_an_interval_is_that_with_the_longest_mean(monkeypatch):
    found, _ = callback(monkeypatch)
    own = np.random.default_rng().uniform(1, 2, size=(3, RANKS))
    numbers = found.of(interval(*own.tolist()))
    means = own.mean(0)
    rank = int(means.argmax())
    assert numbers[RANK_TAG] == rank
    assert numbers[SECONDS_TAG] == pytest.approx(means[rank])
    assert numbers[FACTOR_TAG] == pytest.approx(means[rank] / np.median(np.delete(means, rank)))
    json.dumps(numbers, allow_nan=False)


def test_steps_of_other_ranks_and_those_that_are_not_known_yet_are_passed_over(monkeypatch):
    found, _ = callback(monkeypatch)
    assert found.of(interval([], [0.0] * RANKS, [1.0] * (RANKS + 1))) == {}
    assert found.of(interval([0.0] * RANKS, [1.0, 1.0, 3.0, 1.0]))[RANK_TAG] == 2


def test_of_two_ranks_the_slow_one_is_compared_with_the_other(monkeypatch):
    found, _ = callback(monkeypatch, ranks=2)
    assert found.of(interval([1.0, 3.0]))[FACTOR_TAG] == pytest.approx(3.0)


def test_a_rank_that_stays_slow_is_warned_of_once_with_its_host(monkeypatch):
    found, told = callback(monkeypatch)
    slow, level = [1.0, 1.0, 1.0, SLOW + 0.1], [1.0] * RANKS
    for step in range(INTERVALS - 1):
        found.of(interval(slow, step=step))
    assert told.messages == []
    found.of(interval(slow, step=7))
    (warning,) = told.messages
    assert warning.startswith("WARNING: step 7: rank 3 on n3 is slow") and "1.6 times" in warning
    for _ in range(5):
        found.of(interval(slow))
    assert len(told.messages) == 1
    found.of(interval(level))
    for _ in range(INTERVALS):
        found.of(interval(slow))
    assert len(told.messages) == 2, "it was well again in between"


@pytest.mark.parametrize(
    "slow", [[[1.0, 1.0, 1.0, SLOW - 0.1]] * 9, [[2.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]] * 9]
)
def test_a_little_slower_or_another_rank_each_time_is_no_warning(monkeypatch, slow):
    found, told = callback(monkeypatch)
    for own in slow:
        found.of(interval(own))
    assert told.messages == []


def test_a_run_folder_that_cannot_be_written_is_no_end(monkeypatch):
    def full(**facts: Any) -> None:
        raise OSError(28, "No space left on device")

    _, told = callback(monkeypatch, folder=SimpleNamespace(add_to_start=full))
    assert "No space left on device" in told.messages[0]


@pytest.mark.skipif(
    not hasattr(multi_threaded_pg.ThreadLocalWorld, "comms"),
    reason="this torch's threaded process group cannot be destroyed (2.11)",
)
def test_every_rank_learns_the_seconds_of_each():
    nothing: dict[str, Any] = {"sources": 1, "wait_seconds": 0.5, "norm_before": None, "following": None}
    for total in on_threads(3, lambda rank: add_up([], [], run_of(rank), own_seconds=rank + 0.25, **nothing)):
        assert total.own_seconds == [0.25, 1.25, 2.25]
        assert (total.wait_seconds, total.loss) == (1.5, 0)


def test_waiting_for_a_collective_is_no_work_of_one_s_own(monkeypatch):
    waits: list[float] = []

    def wait(work: Any, *timeout: Any) -> None:
        started = time.perf_counter()
        time.sleep(0.3)
        waits.append(time.perf_counter() - started)

    monkeypatch.setattr(Work, "wait", wait)
    own = OwnTime(torch.device("cpu"))
    assert own.end() == 0, "before the ranks were together"
    started = time.perf_counter()
    with own:
        own.begin()
        time.sleep(0.1)
        assert Work.wait(None) is None  # type: ignore[arg-type]
        time.sleep(0.1)
        first = own.end()
        Work.wait(None)  # type: ignore[arg-type]
        own.begin()
        second = own.end()
    # A busy machine lengthens each of them: they are compared with what they took.
    assert first >= 0.2
    assert first + second <= time.perf_counter() - started - sum(waits)
    started = time.perf_counter()
    Work.wait(None)  # type: ignore[arg-type]
    waited = time.perf_counter() - started
    assert own.end() >= waited, "nothing is noted any more"
