"""A run that diverges without a number that is not finite: it warns, or stops. Real ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL, state

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

HEALTHY = 70  # steps: more than twenty of each objective after the warm-up
MIXED = (
    *SMALL, "objectives=[{kind: ntp, probability: 0.5}, {kind: bico, probability: 0.5, mask: {rate: 0.4}}]",
    "schedule.name=constant", "schedule.decay_steps=null", "checkpoint.every_steps=1000",
)  # fmt: skip
RAISED = "optimizer.lr=0.5"


def train_until(run: Path, step: int, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return train(RECIPE, run, *MIXED, f"training.steps={step}", *overrides, ranks=ranks)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("spikes") / "healthy"
    done = train_until(run, HEALTHY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: step" not in done.stdout
    assert not any("optimizer/spikes" in line for line in metrics(run))
    return run


def spikes_of(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run) if line.get("optimizer/spikes")]


@pytest.fixture(scope="module")
def warned(healthy) -> tuple[Path, str]:
    run = shutil.copytree(healthy, healthy.with_name("warned"))
    done = train_until(run, HEALTHY + 30, RAISED)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


def test_a_run_that_diverges_goes_on_with_one_warning_per_objective(warned):
    run, printed = warned
    lines = re.findall(r"WARNING: step (\d+): the (.*) of (ntp|bico) is", printed)
    assert sorted(name for *_, name in lines) == ["bico", "ntp"]
    found = spikes_of(run)
    assert found[0] == min(int(step) for step, *_ in lines) > HEALTHY
    assert len(found) > 10, "each step of it is counted"


def test_the_micro_batch_with_the_largest_loss_is_named_and_kept(warned):
    run, printed = warned
    step, file = re.findall(r"WARNING: step (\d+):.* see (\S+)", printed)[0]
    (batch,) = json.loads(Path(file).read_text())
    loss = next(line["loss/all"] for line in metrics(run) if line["step"] == int(step))
    assert float(batch["loss"]) / len(batch["targets"]) >= loss * (1 - 1e-6)
    assert batch["documents"] and str(tuple(batch["documents"][0])) in printed


@pytest.mark.slow
def test_a_resume_within_the_divergence_warns_no_second_time_and_counts_the_same_steps(healthy, warned):
    run = shutil.copytree(healthy, healthy.with_name("resumed"))
    printed = "".join(train_until(run, HEALTHY + more, RAISED).stdout for more in (20, 30))
    assert spikes_of(run) == spikes_of(warned[0])
    assert printed.count("WARNING: step") == 2


@pytest.mark.slow
def test_a_run_goes_on_where_the_micro_batch_cannot_be_kept(healthy, warned):
    run = shutil.copytree(healthy, healthy.with_name("unwritable"))
    for file in warned[0].glob("logs/spike-*.json"):
        (run / "logs" / file.name / "in the way").mkdir(parents=True)
    done = train_until(run, HEALTHY + 20, RAISED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"WARNING: step .*, not written to \S+\.json: Is a directory", done.stdout)


def test_stop_ends_all_ranks_before_the_update_and_saves_nothing_of_it(healthy):
    run = shutil.copytree(healthy, healthy.with_name("stopped"))
    done = train_until(run, HEALTHY + 30, RAISED, "training.on_spike=stop", ranks=2)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = re.search(
        r"error: step (\d+): the loss of (\w+) is .*; the weights are unchanged.*rank (\d): documents .*, see (\S+)",
        done.stderr, re.DOTALL,
    )  # fmt: skip
    assert found, done.stderr
    assert Path(found[4]).is_file()
    assert state(run)["state"] == "failed" and "running median" in state(run)["reason"]
    assert metrics(run)[-1]["step"] == int(found[1]) - 1
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert events.Scalars("2 loss/all")[-1].step == int(found[1]) - 1, "nothing waits where a run fails"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{HEALTHY:06d}"]


def test_a_norm_that_jumps_stops_the_run_after_its_update_and_saves_nothing_of_it(healthy):
    """The loss's factor is out of reach."""
    run = shutil.copytree(healthy, healthy.with_name("norm"))
    done = train_until(
        run, HEALTHY + 30, "optimizer.lr=1", "training.on_spike=stop", "training.spike_factors=[1e6, 1.5]"
    )
    assert done.returncode == 1
    assert "the gradient norm of" in done.stderr and "the update was made, and is not saved" in done.stderr
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{HEALTHY:06d}"]


@pytest.mark.slow
def test_off_says_nothing(healthy):
    run = shutil.copytree(healthy, healthy.with_name("off"))
    done = train_until(run, HEALTHY + 10, RAISED, "training.on_spike=off")
    assert done.returncode == 0
    assert "WARNING: step" not in done.stdout
    assert spikes_of(run) == []
