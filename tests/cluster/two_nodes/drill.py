"""What the drills share: a workspace on the cluster, submission, waiting, comparing results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.cluster.two_nodes.settings import NODES
from tests.cluster.two_nodes.two_nodes import TwoNodes, processes_on

PYTHON = sys.executable
TINY = (
    "training.steps=40", "schedule.warmup_steps=5", "schedule.decay_steps=5", "monitor.every_steps=1",
    "checkpoint.every_steps=5", "checkpoint.keep_last=3",
)  # fmt: skip
JOB_SECONDS = 600.0  # a quiet machine needs one


@dataclass
class Workspace:
    """A folder that jobs are submitted from, so that each session makes its own data and runs."""

    cluster: TwoNodes
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    checkout: Path = ROOT

    def command(self, script: str, *arguments: str, python: str = PYTHON) -> subprocess.CompletedProcess[str]:
        """Run one of the project's scripts from here."""
        return subprocess.run(
            [python, str(self.checkout / script), *arguments], cwd=self.folder, env=self.variables(),
            capture_output=True, text=True, timeout=JOB_SECONDS, check=False,
        )  # fmt: skip

    def variables(self) -> dict[str, str]:
        return os.environ | self.cluster.environment | {"OMP_NUM_THREADS": "1"} | self.environment

    def try_submit(
        self, name: str, *options: str, recipe: str = "tiny_base", sets: tuple[str, ...] = (), nodes: int = 2,
        gpus: int = 0,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """launch/slurm/submit.py with one rank per node."""
        overrides = [part for key in (*TINY, *sets) for part in ("--set", key)]
        return self.command(
            "launch/slurm/submit.py", "--recipe", recipe, "--nodes", str(nodes), "--gpus-per-node", str(gpus),
            "--ranks-per-node", "1", "--time", "15", "--native-ops", str(native_ops()), "--output-dir",
            str(self.folder / name), *overrides, *options,
        )  # fmt: skip

    def submit(self, name: str, *options: str, **how: Any) -> Run:
        """Submit, and return the run that came of it."""
        done = self.try_submit(name, *options, **how)
        assert done.returncode == 0, done.stderr
        found = re.match(r"job (\d+)", done.stdout)
        assert found, done.stdout
        return Run(self.cluster, self.folder / name, found[1])


@dataclass
class Run:
    """A submitted job and its run folder."""

    cluster: TwoNodes
    path: Path
    job: str

    @property
    def output(self) -> str:
        """What the batch script printed."""
        return "".join(p.read_text() for p in sorted((self.path / "slurm").glob(f"job-{self.job}.out")))

    def record(self) -> dict[str, str]:
        """SLURM's own record of the job."""
        text = self.cluster.slurm("scontrol", "show", "job", "--oneliner", self.job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def state(self) -> dict[str, Any]:
        path = self.path / "state.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def step(self) -> int:
        steps = self.losses()
        return max(steps, default=0)

    def losses(self) -> dict[int, float]:
        """Loss by step. A step that a restart ran again counts once, as the last line has it."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return {}
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return {line["step"]: line["loss/all"] for line in lines if line["kind"] == "train"}

    def weights(self) -> str:
        """Digest of the exported weights."""
        (file,) = (self.path / "export").glob("*.safetensors")
        return hashlib.blake2b(file.read_bytes()).hexdigest()

    def attempts(self) -> list[dict[str, Any]]:
        path = self.path / "slurm" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = JOB_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.story()}"
            time.sleep(0.3)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step() >= step, f"step {step}")

    def wait_for_end(self) -> dict[str, str]:
        """SLURM's record once the job has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.record()["JobState"] in ended, "the end of the job")
        return self.record()

    def rank_pid(self, rank: int) -> int:
        """The training process of this rank, on whichever node it is."""
        for node in NODES:
            for pid in processes_on(node):
                if {f"RANK={rank}", f"SLURM_JOB_ID={self.job}"} <= environment_of(
                    pid
                ) and "bico_ds.commands.train" in command_of(pid):
                    return pid
        raise AssertionError(f"no rank {rank} of job {self.job}")

    def story(self) -> str:
        """All that was written about this job, for a failing assertion."""
        files = sorted(path for path in (self.path / "logs").glob("*") if path.is_file())
        logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files]
        return "\n".join([self.output[-3000:], *logs])


def environment_of(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()


def command_of(pid: int) -> str:
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(parts) if "python" in parts[0] else ""


def native_ops() -> Path:
    """One folder for all drills: compiling takes longer than a drill."""
    return ROOT / "build" / "native_ops"


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
