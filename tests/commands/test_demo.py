"""The demo, and the cures with its program, train on the CPU, whatever else the machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bico_ds.commands import cures, demo
from bico_ds.common.command_line import Command
from bico_ds.runtime.distributed import read_ranks
from tests.common.whole_words import check_whole, shown


def test_ranks_stay_on_the_cpu_of_a_gpu_machine_when_deepspeed_is_told_so(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # importing DeepSpeed may have set it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_ranks().device.type == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert read_ranks().device.type == "cpu"


@pytest.mark.parametrize("command", [demo.main, cures.main], ids=["demo", "cures"])
def test_a_count_below_one_is_refused_before_anything_runs(command: Command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(["--ranks", "0"])
    assert stopped.value.code == 2
    assert "argument --ranks: must be at least 1" in capsys.readouterr().err


def a_launcher(folder: Path, program: str) -> str:
    launcher = folder / "deepspeed"
    launcher.write_text(f"#!/bin/sh\n{program}\n")
    launcher.chmod(0o755)
    return str(launcher)


def test_the_first_failure_ends_the_command_with_its_exit_code(monkeypatch, tmp_path, capsys):
    launcher = a_launcher(tmp_path, "echo 'error: no room left'; exit 7")
    monkeypatch.setattr(demo, "deepspeed_launcher", lambda: launcher)
    with pytest.raises(SystemExit) as ended:
        demo.main(["--runs", str(tmp_path / "runs")])
    assert ended.value.code == 7
    out, errors = capsys.readouterr()
    assert "tiny_base (1 of 3): failed" in out and "tiny_bico" not in out
    assert errors.endswith("/runs/tiny_base/logs/launch-1.log\nerror: no room left\n")


def test_every_seed_has_runs_of_its_own_from_its_own_base(monkeypatch, tmp_path):
    launcher = a_launcher(tmp_path, "exit 0")
    monkeypatch.setattr(demo, "deepspeed_launcher", lambda: launcher)
    base, bico, ntp = demo.runs_from_base(demo.COMPARED, tmp_path / "seed-11", 2, seed=11)
    assert [run.steps for run in (base, bico, ntp)] == [300, 700, 700]
    assert [run.folder.path.name for run in (base, bico, ntp)] == ["tiny_base", *demo.COMPARED]
    assert "seed=11" in base.command and "data.facts.seed=11" in base.command
    assert f"model.path={tmp_path / 'seed-11' / 'tiny_base' / 'export'}" in ntp.command


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The two runs of a demo, as far as it reads them, by a short path: a long one is wider than a terminal."""
    monkeypatch.chdir(tmp_path)
    for name, reverse in (("tiny_bico", 0.9875), ("tiny_ntp", 0.0)):
        (tmp_path / name).mkdir()
        scores = {"n2d": 1.0, "d2n": 1.0, "n2d_reverse": reverse, "d2n_reverse": reverse}
        line = {f"evaluation/{task}/contains": score for task, score in scores.items()}
        line |= {f"evaluation/{task}/headline": score for task, score in scores.items()}
        written = json.dumps({"step": 700, "kind": "evaluation", **line}) + "\n"
        (tmp_path / name / "metrics.jsonl").write_text(written)
    return Path()


def test_the_end_is_the_table_of_tasks_the_answer_in_words_and_the_report(finished):
    text = " ".join(shown(lambda console: demo.show(finished, console), 80).split())
    assert "Asked the other way round, tiny_bico answers 99 % and tiny_ntp 0 %." in text
    report = finished / "demo" / "report.html"
    assert f"The report: {report};" in text
    assert report.read_text().startswith("<!DOCTYPE html>")
    assert (finished / "demo" / "comparison.md").is_file()
    assert "paired by prompt" not in text and "make tensorboard" in text


def test_the_table_of_seeds_has_every_word_whole(finished):
    text = check_whole(lambda console: demo.show_seeds([finished] * 2, finished, console), 80)
    assert "0.988 (0.988)" in text


@pytest.mark.parametrize(
    ("command", "trained"), [(demo.main, demo.COMPARED), (cures.main, cures.CURES)], ids=["demo", "cures"]
)
def test_the_base_comes_first_and_every_other_run_starts_from_it(command, trained, monkeypatch, tmp_path):
    """The launcher is a program that notes what it was asked and does nothing, so that the comparison finds no run."""
    notes = tmp_path / "asked"
    launcher = a_launcher(tmp_path, f'echo "$DS_ACCELERATOR $*" >> {notes}')
    monkeypatch.setattr(demo, "deepspeed_launcher", lambda: launcher)
    assert command(["--ranks", "3", "--runs", str(tmp_path / "runs")]) == 2
    first, *rest = notes.read_text().splitlines()
    assert all(line.startswith("cpu --num_accelerators 3 ") for line in (first, *rest))
    assert "--recipe tiny_base " in first and "model.path" not in first
    base = f"--set model.path={tmp_path / 'runs' / 'tiny_base' / 'export'}"
    for recipe, line in zip(trained, rest, strict=True):
        assert f"--recipe {recipe} --output-dir {tmp_path / 'runs' / recipe} {base}" in line
