"""A profile of a run beside the planner's parts, and what the command refuses. A training of its own: tests/distributed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bico_ds.commands.show.explain_step import main
from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.short_run import profile_recipe
from bico_ds.training.profile.table import RankStep, as_json, profile_of
from tests import ROOT

CPU = {"device": "a CPU, 2 ranks on the host", "peak_flops": 1e11}
WAITED = 0.03


def run_with_profile(
    folder: Path, planned: dict[str, object], *overrides: str, recipe: str = "tiny_bico", hosts: int = 2
) -> Path:
    """A run folder as a run leaves it, with a step of `ntp` of 0.1 s, of which it waited `WAITED` for data."""
    parts = {StepPart.LINEAR_LAYERS: 0.05, StepPart.DATA: WAITED, StepPart.NORMS: 0.01, StepPart.OTHER: 0.01}
    step = RankStep(objective="ntp", step=12, seconds=0.1, ordinary=0.08, parts=parts)
    profile = folder / "profile" / "step-000012"
    profile.mkdir(parents=True)
    (profile / "table.json").write_text(as_json(profile_of([[step] * hosts], device="cpu")))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe, overrides)))
    start = {"run_id": "a", "hosts": ["n1"] * hosts, **({"plan": planned} if planned else {})}
    (folder / "run.json").write_text(json.dumps([start]))
    return folder


def test_the_profile_of_a_run_stands_beside_the_plan_of_its_devices(tmp_path, capsys):
    run = run_with_profile(tmp_path, CPU)
    assert main(["--run", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["device"], found["ranks"]) == ("tiny_bico", "cpu", 2)
    (step,) = found["steps"]
    assert (step["objective"], step["steps"], step["recorded"], step["ordinary"]) == ("ntp", [12], 0.1, 0.08)
    parts = {part["name"]: part for part in step["parts"]}
    assert sum(part["recorded"] for part in parts.values()) == pytest.approx(0.1)
    for end in ("low", "high"):
        planned = sum(part["planned"][end] for part in parts.values() if part["planned"])
        assert planned == pytest.approx(step["planned"][end])
    assert parts["linear layers"]["planned"]["low"] > 0
    assert parts["data"]["planned"] is None, "the planner does not plan it"
    assert found["advice"][0] | {"why": ""} == {
        "override": "data.workers=2", "saves": {"low": 0.0, "high": pytest.approx(WAITED / 0.1)},
        "middle": pytest.approx(WAITED / 0.1), "is_measured": True, "why": "",
    }  # fmt: skip


def test_a_reader_gets_tables_of_80_columns_and_the_options_to_set(tmp_path, capsys):
    assert main(["--run", str(run_with_profile(tmp_path, CPU))]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[1].startswith("ntp: 80.0 ms a step, 100 ms recorded (mean of 1), planned ")
    assert any(line.startswith("linear layers 50.0 ms 50.0% ") for line in lines)
    assert "data 30.0 ms 30.0% not planned" in lines
    assert "--set data.workers=2" in lines
    assert "saves at most 30.0 % of the time, as measured:" in lines
    assert any(line.startswith("note: steps take up to ") for line in lines)


def test_a_gpu_is_planned_by_the_data_sheet_of_the_name_that_the_run_recorded(tmp_path, capsys):
    """On a machine that has none; what the recipe asks of the model is all in its recipe.yaml."""
    planned = {"device": "NVIDIA H200 SXM, 141 GB", "peak_flops": 1.0}
    few = ("model.config.num_hidden_layers=3", "training.global_batch_bins=32")
    run = run_with_profile(tmp_path, planned, *few, recipe="llama3_8b_bico", hosts=8)
    assert main(["--run", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part["planned"] for part in found["steps"][0]["parts"]}
    assert parts["attention passes"]["low"] > 0 and parts["communication"]["high"] > 0
    assert "training.micro_batch_bins=" in str(found["advice"])


@pytest.mark.parametrize(
    ("planned", "why"),
    [
        ({}, "does not say which devices"),
        ({"device": "a toaster", "peak_flops": None}, "no data sheet of 'a toaster'"),
    ],
)
def test_of_devices_that_are_not_known_the_profile_alone_is_shown(tmp_path, capsys, planned, why):
    assert main(["--run", str(run_with_profile(tmp_path, planned))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "linear layers 50.0 ms 50.0%" in shown and why in shown
    assert "planned" not in shown.replace("no plan", "") and "--set" not in shown


def test_a_run_without_a_profile_is_told_how_to_get_one(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny_bico")))
    assert main(["--run", str(tmp_path)]) == 2
    assert "--profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give either RECIPE"),
        (["tiny_base", "--run", "runs/x"], "give either RECIPE"),
        (["--run", "runs/x", "--ranks", "2"], "are for RECIPE"),
        (["tiny_base", "--steps", "51"], "at most 50 steps"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_launcher_before_it_is_refused(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["tiny_base"]) == 2
    assert "give --ranks N" in capsys.readouterr().err


def test_a_recipe_for_other_ranks_is_refused_before_anything_trains(capsys):
    assert main(["tiny_base", "--set", "distributed.world_size=64"]) == 2
    told = capsys.readouterr().err
    assert "made for 64 ranks" in told and "training" not in told


def test_what_the_training_refuses_is_told_as_it_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = [sys.executable, str(ROOT / "launch" / "train.py")]
    with pytest.raises(UserError, match=r"global_batch_bins.*must be a multiple"):
        profile_recipe(program, "tiny_base", ["training.micro_batch_bins=3"], steps=1)
    assert list(tmp_path.iterdir()) == []
