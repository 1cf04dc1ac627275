"""Starts real runs the way a user does: the `deepspeed` command, real ranks, a run folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(*arguments: str, ranks: int) -> list[str]:
    """`deepspeed launch/train.py …` with as many ranks; plain `python` for one."""
    script = [str(ROOT / "launch" / "train.py"), *arguments]
    if ranks == 1:
        return [sys.executable, *script]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), *script]


def train(
    recipe: str, output: Path, *overrides: str, ranks: int = 2, options: tuple[str, ...] = (), timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Train `recipe` into `output` and return what the command printed."""
    arguments = ["--recipe", recipe, "--output-dir", str(output), *options]
    for override in overrides:
        arguments += ["--set", override]
    return subprocess.run(
        launch_command(*arguments, ranks=ranks),
        cwd=output.parent, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """One thread a rank, and nothing of an outer launcher."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]
