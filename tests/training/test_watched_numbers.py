"""What metrics tell of speed per rank, memory, clipping, and of what telling it costs."""

from __future__ import annotations

import random
import time
from dataclasses import asdict

import pytest
import torch
from torch.testing._internal.distributed import multi_threaded_pg

from bico_ds.config.load import load_recipe
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.planner.ranges import Range
from bico_ds.runtime.peak_memory import MemoryUse, PeakMemory
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, Callbacks, RunStart, StepReport
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.planned import memory_numbers
from bico_ds.training.callbacks.stopwatch import Stopwatch
from bico_ds.training.evaluator import scalars
from bico_ds.training.step_totals import add_up
from tests.distributed.launching import metrics
from tests.distributed.test_many_ranks import on_threads
from tests.training.test_callbacks import report
from tests.training.test_step_totals import WORLD_SIZE, run_of


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


def written(folder: RunFolder, reports: list[StepReport], *options: str, saved=None, **known) -> list[dict]:
    recipe = load_recipe("tiny_bico", ["monitor.every_steps=2", "training.max_grad_norm=1.5", *options])
    monitor = StepMonitor(recipe.monitor, folder, None, **known)
    monitor.on_start(RunStart(recipe=recipe, first_step=0, total_steps=9, summary={}, saved=saved or {}))
    for one in reports:
        monitor.on_step(one)
    monitor.on_end(reports[-1].step, "done")
    return metrics(folder.path)


def test_a_rank_s_speed_is_its_part_of_all_ranks(folder):
    (line,) = written(folder, [report(1, seconds=0.1), report(2, seconds=0.4)], ranks=4)
    for which, tokens in (("kept", 180), ("represented", 200)):
        assert line[f"speed/{which}_tokens_per_second"] == pytest.approx(tokens / 0.5)
        assert line[f"speed/{which}_tokens_per_second_per_rank"] == pytest.approx(tokens / 0.5 / 4)


def test_the_clipped_share_is_of_the_updates_that_were_made(folder):
    nan = float("nan")
    norms = [1.5, 1.6, 9.0, 1.0, nan, 2.0]
    reports = [report(n, grad_norm=norm, applied=norm == norm) for n, norm in enumerate(norms, start=1)]
    lines = written(folder, reports)
    assert [line["optimizer/clipped_share"] for line in lines] == [0.5, 0.5, 1.0]


def test_without_an_update_or_a_limit_nothing_is_clipped_or_divided(folder):
    none = {"grad_norm": float("nan"), "applied": False, "loss": float("nan"), "targets": 0}
    (line,) = written(folder, [report(1, **none), report(2, **none)])
    assert "optimizer/clipped_share" not in line and line["optimizer/skipped_steps"] == 2
    folder.metrics_file.unlink()
    (line,) = written(folder, [report(1), report(2)], "training.max_grad_norm=0")
    assert "optimizer/clipped_share" not in line


def test_memory_is_told_beside_the_plan_s_in_gb():
    use = MemoryUse(allocated=2 * 10**9, reserved=3 * 10**9, peak=4 * 10**9, host=5 * 10**9)
    reports = [report(1, memory={"allocated": 1}), report(2, memory=asdict(use)), report(3)]
    assert memory_numbers(reports, Range(1e9, 6e9)) == {
        "memory/allocated_gb": 2.0,
        "memory/reserved_gb": 3.0,
        "memory/peak_gb": 4.0,
        "memory/host_gb": 5.0,
        "memory/planned_low_gb": 1.0,
        "memory/planned_high_gb": 6.0,
    }
    assert "memory/planned_low_gb" not in memory_numbers(reports, None)
    assert memory_numbers([report(1)], Range(1e9, 6e9)) == {}, "a run resumed from a checkpoint of before"


def test_the_memory_of_a_process_is_what_it_has_and_the_most_it_had():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.now()
    taken = torch.ones(1 << 26)  # 268 MB
    full = memory.now()
    del taken
    after = memory.now()
    for name in ("allocated", "reserved", "peak", "host"):
        grown = getattr(full, name) - getattr(before, name)
        assert 0.95 < grown / (4 << 26) < 1.3, name
    assert after.peak >= full.peak
    assert after.host > after.allocated >= 0


@pytest.mark.skipif(
    not hasattr(multi_threaded_pg.ThreadLocalWorld, "comms"),
    reason="this torch's threaded process group cannot be destroyed (2.11)",
)
def test_every_rank_learns_the_largest_memory_of_any():
    drawn = [[random.randrange(1 << 50) for _ in range(4)] for _ in range(WORLD_SIZE)]
    uses = [MemoryUse(allocated=a, reserved=b, peak=c, host=d) for a, b, c, d in drawn]
    nothing = {"sources": 1, "wait_seconds": 0.5, "norm_before": None, "following": None}

    def added(rank: int):
        return add_up([], [], run_of(rank), own_seconds=rank + 0.25, memory=uses[rank], **nothing)

    expected = [max(column) for column in zip(*drawn, strict=True)]
    for total in on_threads(WORLD_SIZE, added):
        assert list(total.memory.items()) == list(
            zip(("allocated", "reserved", "peak", "host"), expected, strict=True)
        )
        assert total.own_seconds == [0.25, 1.25, 2.25]
        assert total.wait_seconds == 1.5


class Slow(Callback):
    """Takes its time to show something, and notes when it has begun and how long it took."""

    def __init__(self) -> None:
        self.took: list[float] = []

    def on_step(self, report: StepReport) -> None:
        started = time.perf_counter()
        time.sleep(0.02)
        self.took.append(time.perf_counter() - started)

    def on_message(self, text: str) -> None:
        self.on_step(report(1))


def test_the_monitor_s_share_is_that_of_the_interval_s_steps_of_this_start(folder):
    recipe = load_recipe("tiny_bico", ["monitor.every_steps=2"])
    watch = Stopwatch()
    monitor = StepMonitor(recipe.monitor, folder, None, watch=watch)
    slow = Slow()
    callbacks = Callbacks([slow, monitor], is_first_rank=True, watch=watch)
    saved = {"unwritten_steps": [asdict(report(1, seconds=1000.0))]}
    callbacks.on_start(RunStart(recipe=recipe, first_step=1, total_steps=9, summary={}, saved=saved))
    started = time.perf_counter()
    callbacks.on_message("a warning")
    for step in range(2, 7):
        callbacks.on_step(report(step, seconds=0.5))
    elapsed = time.perf_counter() - started
    shares = [line["speed/monitor_share"] for line in metrics(folder.path)]
    spent = [share * seconds for share, seconds in zip(shares, (0.5, 1.0, 1.0), strict=True)]
    # When a line is made, its own step is still being written.
    told = [slow.took[:1], slow.took[1:3], slow.took[3:5]]
    assert all(whole >= sum(part) for whole, part in zip(spent, told, strict=True))
    assert sum(spent) <= elapsed - slow.took[-1]


def test_an_evaluation_tells_the_bounds_of_each_headline_metric():
    n2d = TaskResult(
        headline="bleu",
        metrics={"bleu": 0.5, "exact": 0.25},
        intervals={"bleu": (0.4, 0.7), "exact": (0.1, 0.3)},
    )
    bare = TaskResult(headline="contains", metrics={"contains": 1.0})
    found = scalars(EvaluationResult(tasks={"n2d": n2d, "d2n": bare}))
    assert found == {
        "evaluation/n2d/headline": 0.5,
        "evaluation/n2d/headline_low": 0.4,
        "evaluation/n2d/headline_high": 0.7,
        "evaluation/d2n/headline": 1.0,
        "evaluation/n2d/bleu": 0.5,
        "evaluation/n2d/exact": 0.25,
        "evaluation/d2n/contains": 1.0,
    }
