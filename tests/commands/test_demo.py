"""The demo trains on the CPU, whatever else the machine has."""

from __future__ import annotations

import pytest
import torch

from bico_ds.commands.demo import main
from bico_ds.runtime.distributed import read_ranks


def test_ranks_stay_on_the_cpu_of_a_gpu_machine_when_deepspeed_is_told_so(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # importing DeepSpeed may have set it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_ranks().device.type == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert read_ranks().device.type == "cpu"


def test_a_count_below_one_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--ranks", "0"])
    assert stopped.value.code == 2
    assert "argument --ranks: must be at least 1" in capsys.readouterr().err
