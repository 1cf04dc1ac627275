"""An objective that a user brings by `imports`, beside next-token prediction, on ZeRO-3 with two ranks: trained, resumed,
inspected, watched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import DOUBLING
from tests.distributed.launching import ROOT, environment, metrics, train
from tests.distributed.survival import SMALL, assert_same_course, final_manifest

pytestmark = pytest.mark.distributed

STEPS, STOP = 12, 6
RECIPE = f"""\
extends: tiny_base
imports: [{DOUBLING}]
share_by: tokens
objectives:
  - {{kind: ntp, probability: 0.5}}
  - {{kind: doubling, probability: 0.5}}
"""
SECRET = "description=texts of https://me:abc123@host/texts"
SHORT = (*SMALL, SECRET, f"training.steps={STEPS}", f"checkpoint.every_steps={STOP}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`straight`, and `resumed`, whose second half was trained anew."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.yaml").write_text(RECIPE)
    done = train(str(folder / "own.yaml"), folder / "straight", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(["cp", "-r", "straight", "resumed"], cwd=folder, check=True)
    subprocess.run(["rm", "-r", f"resumed/checkpoints/step-{STEPS:06d}"], cwd=folder, check=True)
    done = train(str(folder / "own.yaml"), folder / "resumed", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {STOP}, the newest complete checkpoint" in done.stdout
    return folder


def test_no_file_of_a_run_keeps_a_secret_of_its_recipe_or_command_line(runs):
    files = [path for path in (runs / "resumed").rglob("*") if path.is_file()]
    assert {"run.json", "recipe.yaml", "manifest.json"} <= {path.name for path in files}
    assert not [path for path in files if b"abc123" in path.read_bytes()]


def test_both_objectives_are_trained(runs):
    lines = metrics(runs / "straight")
    assert {tag for line in lines for tag in line if tag.startswith("loss/")} == {
        "loss/all",
        "loss/ntp",
        "loss/doubling",
    }
    assert final_manifest(runs / "straight", STEPS)["state"]["loader"]["identity"]["objectives[1]"] == {
        "kind": "doubling",
        "version": 1,
    }


def test_the_fill_of_a_step_is_the_plans_also_where_rows_are_twice_the_documents(runs):
    """The plans of both objectives are nearly full; of a doubled document only half is represented."""
    fills = {name: [] for name in ("ntp", "doubling")}
    for line in metrics(runs / "straight"):
        fills["ntp" if "loss/ntp" in line else "doubling"].append(line["data/fill"])
    assert all(min(values) > 0.8 and max(values) <= 1.0 for values in fills.values()), fills


def test_a_resumed_run_ends_as_the_uninterrupted_one(runs):
    assert_same_course(runs / "resumed", runs / "straight", STEPS)


def test_of_as_many_tokens_it_has_more_steps_and_both_runs_tell_what_was_done_on_all_ranks(runs):
    """A doubled document takes twice the room, so its steps have about half the tokens, and there are twice as many."""
    loader = final_manifest(runs / "resumed", STEPS)["state"]["loader"]
    assert loader["step_probabilities"] == pytest.approx([1 / 3, 2 / 3], abs=0.05)
    straight, resumed = (
        {tag: value for tag, value in metrics(runs / name)[-1].items() if tag.startswith(("work/", "share/"))}
        for name in ("straight", "resumed")
    )
    assert {tag for tag in straight if tag.startswith("work/seconds")} == {
        "work/seconds/ntp",
        "work/seconds/doubling",
    }
    for tag, value in straight.items():
        assert resumed[tag] == value or tag.startswith("work/seconds"), tag
    assert straight["work/steps/ntp"] + straight["work/steps/doubling"] == STEPS
    assert straight["work/rows/doubling"] == 2 * straight["work/tokens/doubling"]
    read = sum(loader["sources"][name]["tokens"] for name in loader["sources"])  # as objectives expand them
    assert straight["work/rows/ntp"] + straight["work/rows/doubling"] == read


def test_its_batch_can_be_inspected(runs):
    command = [sys.executable, str(ROOT / "tools" / "inspect_batch.py"), "--recipe", str(runs / "own.yaml")]
    for override in SHORT:
        command += ["--set", override]
    done = subprocess.run(
        [*command, "--objective", "doubling", "--documents", "1"],
        cwd=runs, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "objective doubling" in done.stdout
    fill = float(done.stdout.partition("(fill ")[2].partition("%")[0])
    assert 80 < fill <= 100


def test_tensorboard_has_a_chart_where_its_spec_places_it(runs):
    events = EventAccumulator(str(runs / "straight" / "tensorboard")).Reload()
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"loss on copies" in layout and b"loss/doubling" in layout
