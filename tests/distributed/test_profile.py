"""A profile of a real run: two ranks under ZeRO-3, each objective, gradients accumulated, a pause in its middle."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bico_ds.native.library import native_refusal
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.names import STEP
from bico_ds.training.profile.partition import seconds_by_part
from bico_ds.training.profile.table import read_profile
from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

FIRST, COUNT = 7, 6
PAUSE = FIRST + 2  # a checkpoint after this step
EVERYWHERE = set(StepPart) - {
    *(part for part in StepPart if part.value.startswith("attention")),
    *(
        StepPart.LIVE_ROWS,
        StepPart.ROTATION,
    ),  # by machine: the fused kernel rotates by itself, and takes live rows, too
    *(StepPart.HOST_WAITS, StepPart.OTHER),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "run"
    overrides = (
        *SMALL, f"training.steps={FIRST + COUNT}", f"checkpoint.every_steps={PAUSE}", "training.global_batch_bins=8",
        "objectives=[{kind: ntp, probability: 0.5}, {kind: bico, probability: 0.5}]",
    )  # fmt: skip
    done = train(RECIPE, folder, *overrides, options=("--profile", f"{FIRST}:{COUNT}"))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed.txt").write_text(done.stdout + done.stderr)
    return folder


def events_of(run: Path, rank: int) -> list[dict[str, Any]]:
    with gzip.open(run / "profile" / f"step-{FIRST:06d}" / f"trace-rank-{rank}.json.gz") as file:
        return [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]


def by_step(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The events inside of each recorded step, the step's own first."""
    steps = [event for event in events if event["name"].startswith(STEP)]
    return {
        int(step["name"].split()[-1]): [
            step, *(e for e in events if e is not step and step["ts"] <= e["ts"] < step["ts"] + step["dur"])
        ]
        for step in steps
    }  # fmt: skip


def test_the_rows_of_each_objective_sum_to_the_measured_step(run):
    measured = {line["step"]: line["speed/step_seconds"] for line in metrics(run)}
    steps = by_step(events_of(run, rank=0))
    assert list(steps) == list(range(FIRST, FIRST + COUNT))
    for number, events in steps.items():
        assert sum(seconds_by_part(events, on_cuda=False).values()) == pytest.approx(
            measured[number], rel=0.05
        )
    profile = read_profile(run, FIRST)
    assert profile.ranks == 2 and {table.objective for table in profile.tables} == {"ntp", "bico"}
    assert sorted(step for table in profile.tables for step in table.steps) == list(steps)
    for table in profile.tables:
        assert sum(part.mean for part in table.parts.values()) == pytest.approx(table.seconds, rel=0.05)


def test_hardly_anything_of_a_step_has_no_name(run):
    # Without the fused kernels norms are Hugging Face's, which have no name.
    everywhere = EVERYWHERE - {StepPart.NORMS} if native_refusal() else EVERYWHERE
    for table in read_profile(run).tables:
        assert set(table.parts) >= everywhere
        assert any(part.value.startswith("attention") for part in table.parts)
        other = table.parts.get(StepPart.OTHER)
        assert other is None or other.mean < 0.1 * table.seconds


def test_what_comes_between_steps_is_in_no_trace(run):
    assert (run / "checkpoints" / f"step-{PAUSE:06d}").is_dir()
    for rank in range(2):
        events = events_of(run, rank)
        inside = sum(map(len, by_step(events).values()))
        own = [event for event in events if event["cat"] in ("cpu_op", "user_annotation")]
        assert inside >= 0.99 * len(own)


def test_the_table_is_shown_once_beside_ordinary_steps(run):
    printed, table = (run / "printed.txt").read_text(), run / "profile" / f"step-{FIRST:06d}" / "table.md"
    assert printed.count(table.read_text().strip()) == 1 and "USDT" not in printed
    for found in read_profile(run).tables:
        assert found.ordinary is not None and found.ordinary > 0
