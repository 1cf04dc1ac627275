"""What a real run says of its speed, its memory, and of what watching it costs; its console is slowed down here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import metrics, train

pytestmark = pytest.mark.distributed

RANKS, STEPS, EVERY, SLEEP = 2, 11, 4, 0.1
SLOW_CONSOLE = f"""\
import time
from bico_ds.training.callbacks.console import ConsoleProgress

shown = ConsoleProgress.on_step

def on_step(self, report):
    time.sleep({SLEEP})
    shown(self, report)

ConsoleProgress.on_step = on_step
"""
RECIPE = f"""\
extends: tiny_bico
imports: [slow_console.py]
model: {{path: null}}
training: {{steps: {STEPS}, max_grad_norm: 1.0e-6}}
schedule: {{warmup_steps: 1, decay_steps: 1}}
monitor: {{every_steps: {EVERY}}}
evaluation: {{tasks: [n2d], every_steps: null, limit: 4}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "slow_console.py").write_text(SLOW_CONSOLE)
    (folder / "watched.yaml").write_text(RECIPE)
    done = train(str(folder / "watched.yaml"), folder / "run", ranks=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_what_shows_steps_is_in_the_time_of_later_ones_and_has_its_share_told(run):
    first, second, last = metrics(run)
    # Step 1 is shown when step 2 is made, in the time of step 3.
    assert first["speed/step_seconds"] > SLEEP * 2 / 4
    assert second["speed/step_seconds"] > SLEEP < last["speed/step_seconds"]
    # When a line is made, its own step is still being shown.
    for line, shown in ((first, 3 / 4), (second, 1), (last, 1)):
        assert SLEEP * shown < line["speed/monitor_share"] * line["speed/step_seconds"]
        assert line["speed/monitor_share"] < 1


def test_every_line_tells_the_memory_of_the_fullest_rank_beside_the_plan_s(run):
    lines = metrics(run)
    assert [line["step"] for line in lines] == [4, 8, STEPS]
    for line in lines:
        known = {
            key.removeprefix("memory/"): value for key, value in line.items() if key.startswith("memory/")
        }
        assert set(known) == {f"{name}_gb" for name in
                              ("allocated", "reserved", "peak", "host", "planned_low", "planned_high")}  # fmt: skip
        assert 0 < known["planned_low_gb"] <= known["planned_high_gb"]
        # A model of 0.7 M parameters, beside the libraries that its process has loaded.
        assert 0.01 < known["allocated_gb"] <= known["peak_gb"] < 0.5 * known["host_gb"] < 2
    peaks = [line["memory/peak_gb"] for line in lines]
    assert peaks == sorted(peaks)


def test_every_line_tells_the_speed_of_a_rank_and_the_share_that_was_clipped(run):
    for line in metrics(run):
        for which in ("kept", "represented"):
            speed = line[f"speed/{which}_tokens_per_second"]
            assert line[f"speed/{which}_tokens_per_second_per_rank"] == pytest.approx(speed / RANKS)
        assert line["optimizer/clipped_share"] == 1


def test_an_evaluation_tells_the_interval_of_its_headline(run):
    (line,) = metrics(run, "evaluation")
    low, score, high = (line[f"evaluation/n2d/headline{end}"] for end in ("_low", "", "_high"))
    assert 0 <= low <= score <= high <= 1
