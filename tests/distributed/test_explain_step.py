"""`bico-ds explain-step` as a user gives it: real ranks train some steps, and nothing of them stays."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from tests import ROOT
from tests.distributed.launching import environment
from tests.distributed.survival import RECIPE, SMALL

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
COUNT = 3


def test_a_recipe_s_step_is_measured_on_two_ranks_beside_its_plan_and_nothing_stays(tmp_path):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    overrides = [*SMALL, f"data.cache_dir={tmp_path / 'data'}"]
    words = [RECIPE, "--ranks", "2", "--steps", str(COUNT), "--json"]
    words += [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "explain_step.py"), *words],
        cwd=here, env=environment() | {"TMPDIR": str(temporary)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["device"]) == (2, "cpu")
    assert sorted(step for table in found["steps"] for step in table["steps"]) == [4, 5, 6]
    for table in found["steps"]:
        parts = {part["name"]: part for part in table["parts"]}
        assert sum(part["recorded"] for part in parts.values()) == pytest.approx(table["recorded"], rel=0.05)
        for end in ("low", "high"):
            planned = sum(part["planned"][end] for part in parts.values() if part["planned"])
            assert planned == pytest.approx(table["planned"][end])
        assert parts["linear layers"]["recorded"] > 0 and parts["communication"]["planned"]["high"] > 0
    assert list(here.iterdir()) == [] and not list(temporary.glob("bico_ds-explain-*"))
    running = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if str(temporary) in command]
