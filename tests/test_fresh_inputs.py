"""A failure on random inputs can be seen again: `BICO_DS_SEED=… pytest NAME`."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import torch

from tests import ROOT
from tests.fresh_inputs import draw_for

PROBE = """
import random

import numpy as np
import torch

{before}
def test_fails():
    drawn = [random.random(), torch.rand(()).item(), np.random.default_rng().random()]
    assert drawn == "random"
"""


def drawn() -> list[float]:
    return [random.random(), torch.rand(()).item(), *(np.random.default_rng().random() for _ in range(2))]


def test_a_test_draws_by_its_name_and_each_generator_on_its_own():
    found = []
    for name in ("one", "other", "one"):
        draw_for(name)
        found.append(drawn())
    assert found[0] == found[2]
    assert len(set(found[0]) | set(found[1])) == 8
    assert np.random.default_rng(3).random() == np.random.default_rng(3).random()


def test_the_seed_of_a_failure_brings_its_inputs_back_whatever_ran_before(tmp_path):
    def fails(before: str, seed: str | None) -> tuple[str, str]:
        (tmp_path / "test_probe.py").write_text(PROBE.format(before=before))
        (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
        hidden = {name: value for name, value in os.environ.items() if name != "BICO_DS_SEED"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, tmp_path / "test_probe.py"],
            cwd=tmp_path, env=hidden | ({"BICO_DS_SEED": seed} if seed else {}) | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        (values,) = set(re.findall(r"assert (\[.*?\]) == 'random'", done.stdout))
        return values, re.findall(r"BICO_DS_SEED=(\d+)", done.stdout)[0]

    first, seed = fails("", None)
    again, _ = fails("def test_before():\n    torch.rand(9)\n", seed)
    other, _ = fails("", None)
    assert first == again != other
