"""Starts real runs the ways users do: the `deepspeed` command or ranks as `srun` starts them, a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from bico_ds.runtime.launch_environment import free_port, without_launcher
from tests import ROOT


def launch_command(*arguments: str, ranks: int) -> list[str]:
    """`deepspeed launch/train.py …` with as many ranks; plain `python` for one."""
    script = [str(ROOT / "launch" / "train.py"), *arguments]
    if ranks == 1:
        return [sys.executable, *script]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), *script]


def train(
    recipe: str,
    output: Path,
    *overrides: str,
    ranks: int = 2,
    options: tuple[str, ...] = (),
    timeout: float = 240,
    by_deepspeed: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Train `recipe` into `output` and return what was printed; `by_deepspeed`: by ranks of the `deepspeed` command.

    It and its launcher import nearly as much as two ranks do: others start as `srun` starts them.
    """
    arguments = ["--recipe", recipe, "--output-dir", str(output), *options]
    for override in overrides:
        arguments += ["--set", override]
    if by_deepspeed or ranks == 1:
        return subprocess.run(
            launch_command(*arguments, ranks=ranks),
            cwd=output.parent, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    return as_srun_does(launch_command(*arguments, ranks=1), ranks, output.parent, timeout)


def as_srun_does(
    command: list[str], ranks: int, folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command as so many ranks, and end all where one fails (`--kill-on-bad-exit`).

    What they printed is that of rank 0, then of rank 1 …; the exit code that of the rank that failed first.
    """
    port, streams = free_port(), ("stdout", "stderr")
    with tempfile.TemporaryDirectory() as printed, contextlib.ExitStack() as stack:
        names = {stream: [Path(printed, f"{stream}-{rank}") for rank in range(ranks)] for stream in streams}
        processes = []
        for rank in range(ranks):
            files = {stream: stack.enter_context(names[stream][rank].open("w")) for stream in streams}
            told = environment() | rank_variables(rank, ranks, port)
            processes.append(subprocess.Popen(command, cwd=folder, env=told, text=True, **files))
        try:
            code = ended(processes, command, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = ["".join(file.read_text() for file in names[stream]) for stream in streams]
    return subprocess.CompletedProcess(command, code, *texts)


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher of one node tells a rank of itself."""
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
    }
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}


def ended(processes: list[subprocess.Popen[str]], command: list[str], timeout: float) -> int:
    """Wait for all; where one fails, end the others. Returns its exit code, 0 where none fails."""
    deadline = time.monotonic() + timeout
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(command, timeout)
        time.sleep(0.05)
    for seconds in (5, 30):  # as long as they take to fail, too; then to save
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
            process.terminate()
    return next((code for code in codes if code), 0)


def environment() -> dict[str, str]:
    """One thread per rank, this environment's programs first (two versions of ninja rebuild each other's work), and
    nothing of an outer launcher."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return without_launcher() | {"OMP_NUM_THREADS": "1", "PATH": path}


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def start(
    recipe: str, output: Path, *overrides: str, ranks: int = 2, options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Train `recipe` into `output` in a session of its own; what it prints goes to OUTPUT.log."""
    arguments = ["--recipe", recipe, "--output-dir", str(output), *options]
    for override in overrides:
        arguments += ["--set", override]
    with open(output.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(
            launch_command(*arguments, ranks=ranks),
            cwd=output.parent, env=environment(), stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip


def ranks_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    """The rank processes below a command, by rank; those that have begun."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(command.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                local_rank = [word for word in process.cmdline() if word.startswith("--local_rank=")]
                if local_rank:
                    found[int(local_rank[0].partition("=")[2])] = process
    return [found[rank] for rank in sorted(found)]


def wait_until(
    condition: Callable[[], object], command: subprocess.Popen[str], *, timeout: float = 240
) -> None:
    """Poll until `condition()` is true; a command that ends before, or a timeout, is a failure."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        assert command.poll() is None or condition(), f"the command ended with {command.returncode}"
        time.sleep(0.02)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def end_tree(command: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Send a signal to a command and everything below it, and wait for the command to end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(command.pid)
        for process in [*tree.children(recursive=True), tree]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    command.wait(timeout=120)
