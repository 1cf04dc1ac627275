"""The whole plan beside the memory of a real training process, as the operating system counts it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import make_plan
from bico_ds.planner.workload import Texts
from tests.distributed.launching import start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SHARED = (
    "deepspeed.config=zero3_bf16",
    "model.dtype=fp32",
    "model.config.head_dim=64",
    "data.capacity=2048",
    "training.steps=3",
    "training.micro_batch_bins=1",
    "training.global_batch_bins=1",
    "schedule={name: constant}",
)
TINY = (
    "model.config.hidden_size=64",
    "model.config.num_attention_heads=1",
    "model.config.num_key_value_heads=1",
)
LARGE = (
    "model.config.hidden_size=768",
    "model.config.intermediate_size=2304",
    "model.config.num_hidden_layers=15",
    "model.config.num_attention_heads=12",
    "model.config.num_key_value_heads=4",
)


def most_anonymous_memory(output: Path, *overrides: str) -> int:
    """Bytes, at the most, of a run on one rank (`RssAnon` of Linux)."""
    process, most = start("tiny_base", output, *overrides, ranks=1), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        most = max(most, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.01)
    assert process.returncode == 0, output.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    return most


def planned(*overrides: str) -> float:
    """Bytes at the peak of the plan for one rank on a CPU."""
    texts = Texts(lengths=np.full(100, 20), tokens=None, source="about as long as the embedded task's")
    recipe = load_recipe("tiny_base", list(overrides))
    cpu = replace(DEVICES["h100-80g"], kind="cpu")
    plan = make_plan(recipe, cpu, nodes=1, ranks_per_node=1, texts=texts)
    return plan.memory.peak.bytes.high


def test_a_process_grows_by_what_is_planned(tmp_path):
    """A model of 100 M parameters, beside a tiny one, which has all that does not grow with the model."""
    found = most_anonymous_memory(tmp_path / "large", *SHARED, *LARGE)
    found -= most_anonymous_memory(tmp_path / "tiny", *SHARED, *TINY)
    expected = planned(*SHARED, *LARGE) - planned(*SHARED, *TINY)
    print(f"planned {expected / 1e9:.2f} GB, found {found / 1e9:.2f} GB: {expected / found - 1:+.1%}")
    assert found > 2e9
    assert expected == pytest.approx(found, rel=0.2)
