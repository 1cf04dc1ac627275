"""A rank is slow, then fails: the monitor names it as it trains, the state file its node and what that node tells."""

from __future__ import annotations

import json
import os

import pytest

from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL, state

# A rank cannot be made to have a bad GPU here: it sleeps before each micro-batch, and raises at the last.
BAD = """
import os, time
from bico_ds.batch import PackedBatch

to, calls = PackedBatch.to, []

def late(batch, *arguments, **options):
    calls.append(1)
    time.sleep(0.6)
    if len(calls) == 10:
        raise ArithmeticError("CUDA error: uncorrectable ECC error encountered")
    return to(batch, *arguments, **options)

if os.environ.get("RANK") == "1":
    PackedBatch.to = late
"""
SMI = """#!/bin/sh
case "$1" in
*retired*) exit 1 ;;
*remapped*) echo "0000:3B:00.0, 0, 1, Yes, No" ;;
*) echo "0000:3B:00.0, 0, NVIDIA H100, 0, 1, 1" ;;
esac
"""
DMESG = "#!/bin/sh\necho 'NVRM: Xid (PCI:0000:3b:00): 94, pid=7, name=python, Contained: SM (0x1). RST: No, D-RST: No'\n"


@pytest.mark.distributed
def test_a_slow_rank_is_named_and_the_node_it_fails_on_tells_its_errors(tmp_path, monkeypatch):
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("nvidia-smi", SMI), ("dmesg", DMESG), ("journalctl", "#!/bin/sh\nexit 1\n")):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    run = tmp_path / "run"
    done = train(RECIPE, run, *SMALL, f"imports=[{tmp_path}/bad.py]", timeout=400)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    slowest = [line["speed/slowest_rank"] for line in metrics(run)]
    assert slowest.count(1) >= max(len(slowest) - 1, 3), "but for one that something else held up"
    assert "rank 1 on n7 is slow" in done.stdout
    assert json.loads((run / "run.json").read_text())[-1]["hosts"] == ["n7", "n7"]
    told = state(run)
    assert (told["state"], told["failed_rank"], told["failed_host"]) == ("failed", 1, "n7")
    node = told["nodes"]["n7"]
    assert node["gpus"][0]["ecc.errors.uncorrected.volatile.total"] == 1
    assert node["gpus"][0]["remapped_rows.pending"] is True
    assert [xid["code"] for xid in node["xids"]] == [94]
    assert "uncorrectable ECC error" in told["reason"]
