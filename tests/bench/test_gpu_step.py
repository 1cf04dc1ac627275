"""tools/bench/gpu_step.py and gpu_baselines.py, rehearsed on a CPU: what runs on a rented GPU has run before."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests import ROOT
from tools.bench import gpu_baselines, gpu_step
from tools.bench.baseline_batches import causal_rows
from tools.bench.bench_report import Report
from tools.bench.step_shapes import Steps, check_random_loss, check_same

BENCH = ROOT / "tools" / "bench"
CONTRACT = {"rows", "tables", "steps", "wrong", "notes"}


def run(script: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(script), *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def rehearse(tool: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the tool prints at last."""
    done = run(BENCH / tool, folder, "--rehearse", "--out", "out", "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == CONTRACT and found["wrong"] == []
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["other"], abs=0.001)
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    return found


@pytest.mark.distributed
def test_the_step_of_the_gpu_proof_is_rehearsed(tmp_path):
    optimizer = "deepspeed.overrides={optimizer: {params: {torch_adam: true, fused: true}}}"
    found = rehearse("gpu_step.py", tmp_path, "--set", "model.config.vocab_size=300", "--set", optimizer)
    assert json.loads((tmp_path / "out" / "step.json").read_text()) == found["steps"]
    by_name = {(step["kind"], step["length"], step["backend"]): step for step in found["steps"]}
    kinds = [(kind, length) for length in (16, 64) for kind in ("ntp", "bico")]
    for kind, length in kinds:
        auto, oracle = by_name[kind, length, "auto"], by_name[kind, length, "oracle"]
        assert auto["loss"] == pytest.approx(math.log(300), abs=0.2)  # random weights: each --set counts
        assert auto["loss"] == pytest.approx(oracle["loss"], abs=1e-5)
        assert auto["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-4)
        assert auto["ms"] > 0 and auto["tflops"] > 0 and auto["mfu"] is None
        assert auto["tokens_per_s"] == pytest.approx(128e3 / auto["ms"], abs=1)
        groups = auto["groups"]
        assert sum(groups.values()) == pytest.approx(1, abs=0.01)
        assert {"products of the layers", "attention", "head and loss", "optimizer"} <= {*groups}
        # dead placeholders never enter the model
        assert by_name["ntp", length, "auto"]["rows"] == 128 > by_name["bico", length, "auto"]["rows"]
    compared = {row["name"]: row for row in found["rows"]}
    beside = compared["BICO beside NTP, documents of 64, auto"]
    both = [by_name[kind, 64, "auto"]["ms"] for kind in ("bico", "ntp")]
    assert [beside["ours"], beside["other"]] == pytest.approx(both, abs=0.01)
    assert "oracle beside auto, bico, documents of 16" in compared
    assert any(table["title"].startswith("The 20 costliest kernels: bico") for table in found["tables"])


@pytest.mark.distributed
def test_the_baselines_of_the_gpu_proof_are_rehearsed(tmp_path):
    found = rehearse("gpu_baselines.py", tmp_path)
    (table,) = found["tables"]
    measured = [(kind, length, way.split(",")[0]) for kind, length, way, *_ in table["rows"]]
    for length in (16, 64):
        assert measured.count(("ntp", length, "Hugging Face")) == 2
        assert {("ntp", length, "ours"), ("bico", length, "ours")} <= {*measured}
        assert ("bico", length, "the authors' dense formulation") in measured
    assert len(found["rows"]) >= 6 and all(row["unit"] == "tokens/s" for row in found["rows"])


def steps(loss: float = 5.0, norm: float = 2.0, seconds: float = 0.1) -> Steps:
    return Steps(seconds=[seconds] * 2, losses=[loss] * 2, grad_norms=[norm] * 2, peak_bytes=None)


def test_a_slower_baseline_shows_ours_as_faster():
    report = Report()
    comparison = gpu_baselines.Comparison(Namespace(rows=100, lengths=[50], trl=None), report)
    comparison.ours["ntp", 50] = steps(seconds=0.1)  # 1000 tokens per second
    slow = gpu_baselines.Way(kind="ntp", name="slow", batch=causal_rows)
    comparison.add(slow, 50, tokens_per_s=250.0, peak_bytes=None)
    (row,) = report.rows
    assert (row["ours"], row["other"], row["ratio"]) == (1000, 250, 4.0)
    assert comparison.table[-1][-1] == 4.0


def test_out_of_memory_is_a_baseline_s_result_and_our_failure():
    report = Report()
    comparison = gpu_baselines.Comparison(Namespace(rows=100, lengths=[50], trl=None), report)
    way = gpu_baselines.Way(kind="bico", name="dense", batch=causal_rows)
    comparison.note_failure(way, 2048, torch.OutOfMemoryError("CUDA out of memory"))
    assert report.exit_code == 0 and report.notes == ["dense, bico, documents of 2048: out of memory"]
    ours = gpu_baselines.Way(kind="bico", name=gpu_baselines.OURS, batch=causal_rows)
    comparison.note_failure(ours, 2048, torch.OutOfMemoryError("CUDA out of memory"))
    comparison.note_failure(way, 2048, RuntimeError("shapes"))
    assert report.exit_code == 1 and len(report.wrong) == 2


@pytest.mark.parametrize(("loss", "norm"), [(5.003, 2.0), (5.0, 2.05), (math.nan, 2.0), (5.0, math.nan)])
def test_another_loss_or_norm_of_the_same_batch_is_wrong(loss, norm):
    report = Report()
    check_same(report, "it", steps(loss, norm), steps(), "bf16")
    assert report.exit_code == 1
    report = Report()
    check_same(report, "it", steps(5.0005, 2.005), steps(), "bf16")
    assert report.exit_code == 0


@pytest.mark.parametrize(("loss", "is_wrong"), [(12.58, False), (11.0, True), (14.0, True), (math.inf, True)])
def test_a_loss_that_random_weights_do_not_have_is_wrong(loss, is_wrong):
    llama3_8b = LlamaConfig(vocab_size=128256, hidden_size=4096, initializer_range=0.02)
    report = Report()
    check_random_loss(report, "it", steps(loss), llama3_8b)
    assert (report.exit_code == 1) == is_wrong


@pytest.mark.parametrize("tool", [gpu_step, gpu_baselines], ids=["gpu_step", "gpu_baselines"])
def test_a_document_longer_than_a_step_is_a_usage_error(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--rows", "64", "--lengths", "65"])
    assert ended.value.code == 2
    assert "a document of 65 tokens does not fit --rows 64" in capsys.readouterr().err
