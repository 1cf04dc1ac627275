"""How often a step makes the host wait for the device: counted in a real run, so that a new one is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.distributed.launching import environment, metrics

# Reading a tensor's value from Python is what waits on a GPU, and so does copying a tensor to it at once; a CPU does not
# wait, but our calls are the same. Reads are counted under the innermost function of ours or DeepSpeed's, copies where ours
# make them; DeepSpeed's own waits are others on a GPU, and are left out. Not by a `TorchFunctionMode`, which torch leaves
# before it begins a backward pass.
RUN = """
import json, sys, threading
from collections import Counter
from pathlib import Path
import torch
from torch import Tensor
from bico_ds.config.load import load_recipe
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import start
from bico_ds.training.trainer import Trainer

NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
phases = []

def note(name, frame):
    if phases and threading.current_thread() is threading.main_thread() and "bico_ds/" in frame.f_code.co_filename:
        found = phases[-1][1]
        place = f"{frame.f_code.co_qualname}: {name}"
        found[place] = found.get(place, 0) + 1

def noting(name, read):
    def noted(tensor, *arguments, **options):
        frame = sys._getframe(1)
        while not any(room in frame.f_code.co_filename for room in ("bico_ds/", "/deepspeed/")):
            frame = frame.f_back
        note(name, frame)
        return read(tensor, *arguments, **options)

    return noted

def noting_copies(name, make):
    def noted(*arguments, **options):
        to_device = "device" in options or any(isinstance(a, torch.device) for a in arguments)
        if to_device and not options.get("non_blocking"):
            note(name, sys._getframe(1))
        return make(*arguments, **options)

    return noted

def begins(phase, work):
    def begun(self, *arguments, **options):
        phases.append([phase, {}])
        result = work(self, *arguments, **options)
        phases.append(["between", {}])
        return result

    return begun

for name in NAMES:
    setattr(Tensor, name, noting(name, getattr(Tensor, name)))
Tensor.to = noting_copies("to", Tensor.to)
for name in ("tensor", "as_tensor"):
    setattr(torch, name, noting_copies(name, getattr(torch, name)))
for name in ("_take_step", "_save"):
    setattr(Trainer, name, begins(name, getattr(Trainer, name)))
stop, update = StopFlag(), Trainer._update

def asked_to_stop(self, *arguments):
    if self.step == 4:
        stop.set("asked")
    return update(self, *arguments)

Trainer._update = asked_to_stop
start.train(load_recipe(sys.argv[1], sys.argv[3:]), output_dir=Path(sys.argv[2]), resume="none", stop=stop)
print("waits", json.dumps(phases))
"""


STEP = ["_take_step", {"all_reduce_sum: tolist": 1}]
NOTHING: list[Any] = ["between", {}]
NORM = ["between", {"Trainer._report: __float__": 1}]
AGREEMENT = ["between", {"all_reduce_sum: tolist": 1}]


@pytest.mark.distributed
def test_a_step_reads_the_device_once_and_around_a_pause_and_a_stop_takes_one_step_more(tmp_path):
    """Of 4 micro-batches each, of two sources. A checkpoint after step 4; in step 5 a stop, after the votes on step 6."""
    overrides = [
        "training.micro_batch_bins=1", "training.steps=9", "schedule.warmup_steps=1", "schedule.decay_steps=1",
        "checkpoint.every_steps=4", "data.sources=[{facts: both_orders}, {facts: all}]", "monitor.every_steps=1",
    ]  # fmt: skip
    command = [sys.executable, "-c", RUN, "tiny_base", str(tmp_path / "run"), *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = [
        json.loads(line[len("waits ") :]) for line in done.stdout.splitlines() if line.startswith("waits ")
    ]
    phases = [phase for phase in found if phase[0] != "_save"]
    until_4, until_6 = [STEP, NOTHING] * 3 + [STEP, NORM], [STEP, NOTHING, STEP, NORM]
    assert phases[:-1] == [*until_4, AGREEMENT, *until_6]
    assert [name for name, _ in found].count("_save") == 2
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
