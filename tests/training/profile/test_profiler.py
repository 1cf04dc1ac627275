"""The profiler on one real rank: what it writes, where a run ends in its middle, and a folder that cannot be written."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bico_ds.named_parts import step_part
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.runtime.distributed import Ranks
from bico_ds.training.profile.names import STEP
from bico_ds.training.profile.profiler import StepProfiler
from bico_ds.training.profile.table import read_profile
from tests.full_disk import files_limited_to

RANKS = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def profiler(run: Path, steps: list[int]) -> tuple[StepProfiler, list[str]]:
    told: list[str] = []
    return StepProfiler(steps, RANKS, run / "profile", told.append), told


def take(profiler: StepProfiler, step: int, *, objective: str = "ntp") -> float:
    """A step with a product, a named part and a collective; returns its seconds."""
    profiler.begin(step)
    started = time.perf_counter()
    x = torch.ones(200, 200, requires_grad=True)
    with step_part("rotation"):
        y = x * 2
    (y @ y).sum().backward()
    dist.all_reduce(torch.ones(3))
    profiler.settle()
    seconds = time.perf_counter() - started
    profiler.end(step, objective, seconds)
    return seconds


def trace_of(run: Path, first: int) -> list[dict[str, Any]]:
    with gzip.open(run / "profile" / f"step-{first:06d}" / "trace-rank-0.json.gz") as file:
        return json.load(file)["traceEvents"]


def test_chosen_steps_are_recorded_beside_the_median_of_the_others(tmp_path):
    found, told = profiler(tmp_path, [4, 6])
    seconds = {step: take(found, step, objective="ab"[step % 2]) for step in range(1, 8)}
    (table,) = read_profile(tmp_path).tables
    assert (table.objective, table.steps) == ("a", (4, 6))
    assert table.ordinary == seconds[2]
    assert table.seconds == pytest.approx((seconds[4] + seconds[6]) / 2)
    assert {StepPart.ROTATION, StepPart.LINEAR_LAYERS, StepPart.COMMUNICATION} <= set(table.parts)
    names = [event["name"] for event in trace_of(tmp_path, 4) if event.get("name", "").startswith(STEP)]
    assert names == [f"{STEP} 4", f"{STEP} 6"]
    (shown,) = told
    assert "a, steps 4 6: profiled step" in shown and "perfetto" in shown and "memory" not in shown
    assert {path.name for path in (tmp_path / "profile" / "step-000004").iterdir()} == {
        "table.json", "table.md", "trace-rank-0.json.gz"
    }  # fmt: skip


def test_a_run_in_a_folder_of_any_name_has_a_profile(tmp_path):
    run = tmp_path / 'a "b" \\c\nd\udcff'
    found, _ = profiler(run, [2])
    take(found, 1)
    take(found, 2)
    assert read_profile(run).tables[0].steps == (2,)
    assert f"{STEP} 2" in [event["name"] for event in trace_of(run, 2)]


def test_a_step_profiled_again_has_nothing_beside_it_of_the_start_before(tmp_path):
    folder = tmp_path / "profile" / "step-000002"
    folder.mkdir(parents=True)
    former = ["trace-rank-0.json.gz", "memory-rank-7.pickle", "table.json", "table.md"]
    former += ["trace-rank-7.json.gz", ".trace-rank-7.json.gz.0123456789ab.incomplete"]
    for name in (*former, "trace-rank-7.json.gz (mine)"):
        (folder / name).touch()
    found, _ = profiler(tmp_path, [2])
    found.begin(2)
    assert [path.name for path in folder.iterdir()] == ["trace-rank-7.json.gz (mine)"]
    found.close()


def test_a_run_that_ends_in_the_middle_keeps_what_is_there(tmp_path):
    found, told = profiler(tmp_path, [2, 3, 4])
    take(found, 1)
    take(found, 2)
    found.begin(3)
    found.close()
    found.close()
    assert read_profile(tmp_path).tables[0].steps == (2,)
    assert sum(event.get("name") == f"{STEP} 2" for event in trace_of(tmp_path, 2)) == 1
    assert len(told) == 1 and "ntp, step 2" in told[0]


def test_what_cannot_be_written_is_told_and_no_step_fails(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    found, told = profiler(tmp_path, [2, 3])
    for step in range(1, 5):
        take(found, step)
    assert [line.split(":")[0] for line in told] == ["WARNING"] * 2
    assert (
        "step 2 is not in the profile: rank 0: Not a directory" in told[0] and "training goes on" in told[0]
    )


def test_on_a_full_disk_the_reason_is_told_and_nothing_is_left(tmp_path):
    found, told = profiler(tmp_path, [2])
    take(found, 1)
    with files_limited_to(1000):
        take(found, 2)
    assert "torch could not write its trace" in told[0] and "is the disk full?" in told[0]
    assert not list((tmp_path / "profile" / "step-000002").iterdir())


def test_outside_of_recorded_steps_nothing_is_changed(tmp_path):
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import Work

    before = Work.wait, get_accelerator().range_push, get_accelerator().range_pop
    found, _ = profiler(tmp_path, [1])
    found.begin(1)
    assert Work.wait is not before[0]
    found.close()
    assert before == (Work.wait, get_accelerator().range_push, get_accelerator().range_pop)
