"""The demo, and the cures with its program, train on the CPU, whatever else the machine has."""

from __future__ import annotations

import pytest
import torch

from bico_ds.commands import cures, demo
from bico_ds.common.command_line import Command
from bico_ds.runtime.distributed import read_ranks


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


@pytest.mark.parametrize(
    ("command", "trained"), [(demo.main, demo.COMPARED), (cures.main, cures.CURES)], ids=["demo", "cures"]
)
def test_the_base_comes_first_and_every_other_run_starts_from_it(command, trained, monkeypatch, tmp_path):
    """The launcher is a program that notes what it was asked and does nothing, so that the comparison finds no run."""
    notes = tmp_path / "asked"
    launcher = tmp_path / "deepspeed"
    launcher.write_text(f'#!/bin/sh\necho "$DS_ACCELERATOR $*" >> {notes}\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(demo, "deepspeed_launcher", lambda: str(launcher))
    assert command(["--ranks", "3", "--runs", str(tmp_path / "runs")]) == 2
    first, *rest = notes.read_text().splitlines()
    assert all(line.startswith("cpu --num_accelerators 3 ") for line in (first, *rest))
    assert "--recipe tiny_base " in first and "model.path" not in first
    base = f"--set model.path={tmp_path / 'runs' / 'tiny_base' / 'export'}"
    for recipe, line in zip(trained, rest, strict=True):
        assert f"--recipe {recipe} --output-dir {tmp_path / 'runs' / recipe} {base}" in line
