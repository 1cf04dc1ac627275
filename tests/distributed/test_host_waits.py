"""How often a step makes the host wait for the device: counted in a real run, so that a new one is seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.distributed.launching import environment

# Reading a tensor's value from Python is what waits on a GPU; a CPU does not wait, but our calls are the same. Each is
# counted under the innermost function of ours or DeepSpeed's; DeepSpeed's own are others on a GPU, and are left out. Not
# by a `TorchFunctionMode`, which torch leaves before it begins a backward pass.
RUN = """
import json, sys, threading
from collections import Counter
from pathlib import Path
from torch import Tensor
from bico_ds.config.load import load_recipe
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import start
from bico_ds.training.trainer import Trainer

NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
found = None

def noting(name, read):
    def noted(tensor, *arguments, **options):
        if found is not None and threading.current_thread() is threading.main_thread():
            frame = sys._getframe(1)
            while not any(room in frame.f_code.co_filename for room in ("bico_ds/", "/deepspeed/")):
                frame = frame.f_back
            if "bico_ds/" in frame.f_code.co_filename:
                found[f"{frame.f_code.co_qualname}: {name}"] += 1
        return read(tensor, *arguments, **options)

    return noted

for name in NAMES:
    setattr(Tensor, name, noting(name, getattr(Tensor, name)))
take_step = Trainer._optimize

def counted(self, rank_step, targets, *rest):
    global found
    found = Counter()
    agreed = self._agree(rank_step.batches)
    report = take_step(self, rank_step, targets, *rest)
    print("waits", json.dumps([len(rank_step.batches), found]))
    found = None
    return report

Trainer._optimize = counted
start.train(load_recipe(sys.argv[1], sys.argv[3:]), output_dir=Path(sys.argv[2]), resume="none", stop=StopFlag())
"""


PER_STEP = {
    "all_reduce_sum: tolist": 2,  # the targets of the step, and its totals
    "Trainer._totals: tolist": 1,
    "Trainer._optimize: __float__": 1,  # of the gradient's norm
}


@pytest.mark.distributed
def test_a_step_reads_four_values_and_a_micro_batch_none(tmp_path):
    overrides = ["training.micro_batch_bins=1", "training.steps=2"]
    overrides += ["schedule.warmup_steps=1", "schedule.decay_steps=1"]
    command = [sys.executable, "-c", RUN, "tiny_base", str(tmp_path / "run"), *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line[len("waits ") :]) for line in done.stdout.splitlines() if line.startswith("waits ")
    ]
    assert steps == [[4, PER_STEP], [4, PER_STEP]]  # with 4 micro-batches each
