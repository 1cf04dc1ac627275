"""Small runs for the survival tests and drills, and what must be the same after whatever happened to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.launching import metrics

RECIPE = "tiny_base"
STEPS = 40
EVERY = 5  # steps between two checkpoints
LIMITS = ("distributed.timeout_minutes=3", "distributed.watchdog_minutes=2")
SMALL = (
    "data.facts.name_first=3", "data.facts.description_first=3", "data.facts.both=6", "data.facts.test_prompts=1",
    "model.config.vocab_size=51", "model.config.hidden_size=64", "model.config.intermediate_size=128",
    "model.config.head_dim=32", "monitor.every_steps=1", "schedule.warmup_steps=3", "schedule.decay_steps=5",
    f"training.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.export=false", *LIMITS,
)  # fmt: skip


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, gradient norm, learning rate) of every logged step, to the last bit."""
    keys = ("loss/all", "optimizer/grad_norm", "optimizer/learning_rate")
    return [(line["step"], *(line[key] for key in keys)) for line in metrics(run)]  # type: ignore[misc]


def final_manifest(run: Path, step: int = STEPS) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())


def assert_same_course(run: Path, straight: Path, step: int = STEPS) -> None:
    """Losses, gradient norms, weights, optimizer state and data position are those of the uninterrupted run."""
    assert curve(run) == curve(straight)
    ours, theirs = final_manifest(run, step), final_manifest(straight, step)
    assert ours["checksums"] == theirs["checksums"]
    assert ours["optimizer_steps"] == theirs["optimizer_steps"]
    assert ours["state"]["loader"] == theirs["state"]["loader"]
    folder = run / "checkpoints" / f"step-{step:06d}"
    assert set(ours["files"]) == {file.name for file in folder.glob("*.pt")}, "of all ranks, and no other"


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "state.json").read_text())


def log(run: Path) -> str:
    return run.with_suffix(".log").read_text(encoding="utf-8")
