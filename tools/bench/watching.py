#!/usr/bin/env python
"""What watching a run costs: console, metrics.jsonl, TensorBoard and CSV, beside a step of the demo.

    python tools/bench/watching.py [--ranks N] [--steps N] [--json]

Part 1: tiny_bico (random weights, no evaluation) is trained in turn with all but CSV on, with a line of metrics at every
step and at every tenth; with CSV, too, at every step; and with everything off. All take the same steps. What the run itself
says of its cost (`speed/monitor_share`) is wall time; the CPU time of the same calls stands beside that of rank 0's process,
since other work on the machine counts less there. It moves the ratio of the step times by more than the cost is.

Part 2: the steps of such a run are shown and written in this process, by all and by each alone; between two of them it
multiplies matrices, as a step would, so that no cache keeps what showing and writing need. CPU time, so that other work on
the machine does not count, beside the step time of part 1 with everything off.
"""

from __future__ import annotations

import json
import os
import pty
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table

from bico_ds.common.command_line import Command
from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import cpu_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.workload import Texts
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, Callbacks, RunStart, StepReport
from bico_ds.training.callbacks.console import ConsoleProgress
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.planned import planned_memory
from bico_ds.training.callbacks.utilization import Utilization
from bico_ds.training.callbacks.work import ObjectiveWork

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 120
SHOWN_STEPS, PAUSE_SECONDS = 60, 0.1  # so long a step: what is drawn or written once a second is of ten
EVERY = {1: "a line at every step", 10: "at every tenth"}
RUNS = {
    EVERY[1]: ["monitor.every_steps=1"],
    EVERY[10]: ["monitor.every_steps=10"],
    f"{EVERY[1]}, and CSV": ["monitor.every_steps=1", "monitor.csv=true"],
}
MODEL = ["model.path=null", "evaluation.tasks=[]"]


# What a run imports: it notes, by step, the CPU seconds of rank 0's process and those of showing and writing among them.
NOTING = """\
import json, time
from pathlib import Path
from bico_ds.training.callbacks.base import Callbacks

shown, found = Callbacks.on_step, []

def on_step(self, report):
    before, process = time.thread_time(), time.process_time()
    shown(self, report)
    found.append((process, time.thread_time() - before))
    if len(self._callbacks) > 3 and report.step == {steps}:  # rank 0 has those that show and write
        Path({file!r}).write_text(json.dumps(found))

Callbacks.on_step = on_step
"""


@dataclass(frozen=True)
class Watched:
    """Of a step, means over the second half of a run: seconds, those of watching by its own timer, CPU seconds of both."""

    step: float
    watching: float
    step_cpu: float
    watching_cpu: float


def train(folder: Path, *settings: str, ranks: int, steps: int) -> Watched:
    """Run tiny_bico as a user at a terminal does."""
    noted, imported = folder.with_suffix(".json"), folder.with_suffix(".py")
    imported.write_text(NOTING.format(steps=steps, file=str(noted)))
    schedule = [f"training.steps={steps}", "schedule.warmup_steps=1", "schedule.decay_steps=1"]
    given = (*MODEL, *schedule, f"imports=[{imported}]", *settings)
    overrides = [word for setting in given for word in ("--set", setting)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    script = [str(ROOT / "launch" / "train.py"), "--recipe", "tiny_bico", "--output-dir", str(folder)]
    terminal, other_end = pty.openpty()
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": str(COLUMNS)}
    command = subprocess.Popen(
        [*launcher, "--master_port", str(port), *script, *overrides],
        stdout=other_end,
        stderr=other_end,
        env=environment,
    )
    os.close(other_end)
    printed: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(terminal, printed))
    reader.start()
    failed = command.wait()
    reader.join()
    if failed:
        sys.exit(b"".join(printed).decode(errors="replace"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = [line for line in lines if line["kind"] == "train" and line["step"] > steps // 2]
    seconds = [line["speed/step_seconds"] for line in late]
    watching = [line["speed/step_seconds"] * line["speed/monitor_share"] for line in late]
    cpu = json.loads(noted.read_text())[steps // 2 :]
    return Watched(
        step=statistics.fmean(seconds),
        watching=statistics.fmean(watching),
        step_cpu=(cpu[-1][0] - cpu[0][0]) / (len(cpu) - 1),
        watching_cpu=statistics.fmean(of_step for _, of_step in cpu[:-1]),
    )


def read_all(terminal: int, printed: list[bytes]) -> None:
    """Take what is shown on a terminal until nobody can show anything more."""
    try:
        while part := os.read(terminal, 1 << 16):
            printed.append(part)
    except OSError:  # so Linux says that the other end is closed
        pass
    os.close(terminal)


def measure_runs(ranks: int, steps: int) -> tuple[list[dict[str, Any]], float]:
    """Part 1: its rows, and the seconds of a step of which nothing is shown."""
    off = ["monitor.tensorboard=false", f"monitor.every_steps={steps // 2}"]
    with tempfile.TemporaryDirectory() as folder:
        bare = train(Path(folder, "off"), *off, ranks=ranks, steps=steps)
        watched = {
            name: train(Path(folder, f"on-{number}"), *settings, ranks=ranks, steps=steps)
            for number, (name, settings) in enumerate(RUNS.items())
        }
    rows = []
    for name, found in watched.items():
        rows.append(row(f"run, {name}: by its own timer", found.watching, found.step))
        rows.append(row(f"run, {name}: CPU time", found.watching_cpu, found.step_cpu))
        rows.append(row(f"run, {name}: step, beside one with all off", found.step, bare.step))
    return rows, bare.step


def plan_of(ranks: int) -> Plan:
    device = cpu_device(memory_bytes=1 << 34, flops=1e10, ranks=ranks)
    texts = Texts.of(np.random.default_rng().integers(10, 100, 50), source="drawn")
    return make_plan(load_recipe("tiny_bico", MODEL), device, nodes=1, ranks_per_node=ranks, texts=texts)


def reports(ranks: int) -> list[StepReport]:
    """Steps as tiny_bico reports them."""
    draw = random.Random(0)
    return [
        StepReport(
            step=step,
            objective=draw.choice(["ntp", "bico"]),
            loss=draw.uniform(1, 3),
            targets=600,
            grad_norm=draw.uniform(0.5, 2),
            learning_rate=draw.uniform(1e-4, 1e-3),
            kept_tokens=600,
            represented_tokens=640,
            fill=draw.uniform(0.9, 1),
            seconds=draw.uniform(0.07, 0.09),
            wait_seconds=draw.uniform(0, 0.001),
            sources={"facts_all": {"rows": 65 * step, "tokens": 640 * step}},
            pairs=25_000,
            weight=600.0,
            own_seconds=[draw.uniform(0.07, 0.09) for _ in range(ranks)],
            memory={name: 10**8 * (number + step) for number, name in enumerate(MEMORY)},
        )
        for step in range(1, SHOWN_STEPS + 1)
    ]


MEMORY = ("allocated", "reserved", "peak", "host")
# What is on besides metrics.jsonl.
PARTS: dict[str, set[str]] = {
    "metrics.jsonl": set(),
    "and TensorBoard": {"tensorboard"},
    "and CSV": {"csv"},
    "and the console": {"console"},
    "all but CSV": {"tensorboard", "console"},
    "all": {"tensorboard", "csv", "console"},
}


def watchers(folder: Path, parts: set[str], every: int, ranks: int) -> Callbacks:
    """What a run has to show and write its steps."""
    is_asked = "tensorboard" in parts
    recipe = load_recipe(
        "tiny_bico", [*MODEL, f"monitor.every_steps={every}", f"monitor.tensorboard={is_asked}"]
    )
    run, plan = RunFolder(folder), plan_of(ranks)
    run.path.mkdir()
    shown = Console(file=open(os.devnull, "w"), force_terminal=True, width=COLUMNS)  # noqa: SIM115  the process's
    console = ConsoleProgress(shown) if "console" in parts else Callback()
    work, utilization = ObjectiveWork(plan, run, console), Utilization.planned(plan)
    # As DeepSpeed's monitor hands numbers to its writers, of which a run puts its own in the place.
    csv: Any = SimpleNamespace(enabled="csv" in parts, csv_monitor=object(), wandb_monitor=None)
    csv.write_events = lambda events: csv.csv_monitor.write_events(events)
    memory = planned_memory(plan)
    monitor = StepMonitor(recipe.monitor, run, csv, utilization, work, ranks=ranks, planned_memory=memory)
    callbacks = Callbacks([work, console, monitor], is_first_rank=True)
    callbacks.on_start(RunStart(recipe=recipe, first_step=0, total_steps=SHOWN_STEPS, summary={}))
    return callbacks


def cpu_seconds(callbacks: Callbacks, ranks: int) -> float:
    """Of one step, in the mean over `SHOWN_STEPS` of them."""
    matrix, spent = torch.randn(512, 512), 0.0
    for report in reports(ranks):
        until = time.perf_counter() + PAUSE_SECONDS
        while time.perf_counter() < until:
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        started = time.thread_time()
        callbacks.on_step(report)
        spent += time.thread_time() - started
    callbacks.on_end(SHOWN_STEPS, "preempted")
    return spent / SHOWN_STEPS


def measure_parts(ranks: int, step_seconds: float) -> list[dict[str, Any]]:
    """Part 2."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for every, often in EVERY.items():
            for name, parts in PARTS.items():
                callbacks = watchers(Path(folder, f"{every} {name}"), parts, every, ranks)
                rows.append(row(f"{often}: {name}", cpu_seconds(callbacks, ranks), step_seconds))
    return rows


def row(name: str, ours: float, other: float) -> dict[str, Any]:
    """One line of the table; seconds are shown as milliseconds."""
    return {"name": name, "ours": ours * 1e3, "other": other * 1e3, "unit": "ms", "ratio": ours / other}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="of the runs (default: 2)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of each run (default: 120)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: Namespace) -> None:
    """Measure, print the table, and with --json a last line for machines."""
    torch.set_num_threads(1)
    rows, step_seconds = measure_runs(options.ranks, options.steps)
    rows += measure_parts(options.ranks, step_seconds)
    table = Table("what", "ours", "other", "unit", "ratio")
    for line in rows:
        table.add_row(
            line["name"], f"{line['ours']:.3g}", f"{line['other']:.3g}", line["unit"], f"{line['ratio']:.4f}"
        )
    Console(width=120).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
