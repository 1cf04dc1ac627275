"""tools/bench/gpu_run.py: what it takes for wrong. The rehearsal of all of it is in tests/distributed/test_gpu_proof.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from bico_ds.common.errors import RunError, UserError
from tools.bench import gpu_run

REFERENCE = json.loads(gpu_run.REFERENCE.read_text())


def runs_with(folder, *, straight, killed, on_cuda=True) -> gpu_run.Runs:
    """Runs that have ended, with these losses."""
    for name, losses in (("straight", straight), ("killed", killed)):
        (folder / name).mkdir()
        lines = [
            json.dumps({"kind": "train", "step": step, "loss/all": loss})
            for step, loss in enumerate(losses, 1)
        ]
        checkpoint = json.dumps({"kind": "checkpoint", "step": 8})
        (folder / name / "metrics.jsonl").write_text("\n".join([*lines, checkpoint, '{"kind": "tra']))
    return gpu_run.Runs(folder=folder, on_cuda=on_cuda, dtype="bf16")


def verdicts(runs: gpu_run.Runs) -> list[bool]:
    return [right for _, _, _, right in gpu_run.compare_losses(runs)]


def test_a_gpu_s_losses_may_differ_as_bf16_does_and_no_further(tmp_path):
    fp32, bf16 = REFERENCE["fp32"], REFERENCE["bf16"]
    assert len(fp32) == len(bf16) == gpu_run.STEPS
    first, second, third = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder in (first, second, third):
        folder.mkdir()
    assert verdicts(runs_with(first, straight=bf16, killed=bf16)) == [True, True]
    at = random.randrange(gpu_run.COMPARED)
    limit = gpu_run.limits(on_cuda=True)[at]
    differences = [abs(a - b) for a, b in zip(fp32, bf16, strict=True)]
    assert limit == gpu_run.TIMES * max(differences[: max(at + 1, gpu_run.EVERY)])
    wrong = [loss + 1.01 * limit * (step == at) for step, loss in enumerate(fp32)]
    assert verdicts(runs_with(second, straight=wrong, killed=wrong)) == [False, True]
    assert verdicts(runs_with(third, straight=fp32, killed=wrong)) == [True, False]


def test_a_cpu_has_to_meet_the_reference_itself(tmp_path):
    fp32, bf16 = REFERENCE["fp32"], REFERENCE["bf16"]
    (tmp_path / "same").mkdir()
    assert verdicts(runs_with(tmp_path / "same", straight=fp32, killed=fp32, on_cuda=False)) == [True, True]
    assert verdicts(runs_with(tmp_path, straight=bf16, killed=fp32, on_cuda=False)) == [False, False]


def test_a_loss_that_is_missing_or_not_a_number_is_no_agreement(tmp_path):
    fp32 = REFERENCE["fp32"]
    (tmp_path / "nan").mkdir()
    assert verdicts(runs_with(tmp_path, straight=fp32, killed=fp32[:-1])) == [True, False]
    nan = [*fp32[:3], float("nan"), *fp32[4:]]
    assert verdicts(runs_with(tmp_path / "nan", straight=nan, killed=fp32)) == [False, False]


def test_a_run_that_fails_is_told_with_its_last_words_and_none_outlives_the_tool(tmp_path):
    with gpu_run.Runs(folder=tmp_path, on_cuda=False, dtype="fp32") as runs:
        failed = runs.start("failed", "no.such.key=1")
        other = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        runs.started.append(other)
        with pytest.raises(RunError, match=r"(?s)'failed' failed \(exit code 2\).*no.such.key"):
            runs.finish("failed", failed)
    assert other.poll() is not None


def test_the_logs_of_the_runs_stay_and_an_older_proof_s_do_not(tmp_path):
    out = tmp_path / "out" / "run"
    for _ in range(2):
        gpu_run.make_empty_logs(out)
        with gpu_run.Runs(folder=tmp_path, logs=out, on_cuda=False, dtype="fp32") as runs:
            process = runs.start("killed", "no.such.key=1")
            with pytest.raises(RunError, match="the run 'killed' failed"):
                runs.finish("killed", process)
    assert (out / "killed.log").read_text().count("error: ") == 1
    assert (out / "straight.log").read_bytes() == b""


def test_a_place_for_logs_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to "):
        gpu_run.make_empty_logs(tmp_path / "file" / "run")
