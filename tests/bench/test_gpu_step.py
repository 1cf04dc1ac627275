"""tools/bench/gpu_step.py, rehearsed on a CPU: what runs on a rented GPU has run before."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tools.bench import gpu_step

STEP = ROOT / "tools" / "bench" / "gpu_step.py"


def run(script: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(script), *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.distributed
def test_the_step_of_the_gpu_proof_runs_on_tiny_bico(tmp_path):
    shape = ("--layers", "2", "--rows", "128", "--lengths", "32", "--steps", "1", "--profile", "--json")
    optimizer = "deepspeed.overrides={optimizer: {params: {torch_adam: true, fused: true}}}"
    done = run(
        STEP,
        tmp_path,
        "--recipe",
        "tiny_bico",
        *shape,
        "--out",
        "out",
        "--set",
        "model.config.vocab_size=300",
        "--set",
        optimizer,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "step.json").read_text())
    assert [(row["kind"], row["length"]) for row in figures] == [("ntp", 32), ("bico", 32)]
    ntp, bico = figures
    assert ntp["rows"] == 128 > bico["rows"]  # dead placeholders never enter the model
    for row in figures:
        assert row["loss"] == pytest.approx(math.log(300), abs=1)  # random weights: each --set counts
        assert row["ms"] > 0 and row["tflops"] > 0
    (compared,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert compared["ratio"] == pytest.approx(bico["ms"] / ntp["ms"], abs=0.01)
    assert "aten::mm" in done.stdout  # the profile


def test_a_document_longer_than_a_step_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_step.main(["--rows", "64", "--lengths", "65"])
    assert ended.value.code == 2
    assert "a document of 65 tokens does not fit --rows 64" in capsys.readouterr().err
