"""Train the demo: tiny_base, then tiny_bico and tiny_ntp from it, on ZeRO-3; then compare both.

    bico-ds demo                          one seed, into runs/NAME
    bico-ds demo --seeds 11 12 13         each into runs/seed-N/NAME, and the mean and worst over all

A run that is done already is not trained again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from bico_ds.cluster.local.forecast import LocalRun
from bico_ds.cluster.local.in_turn import train_in_turn
from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError
from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.arguments import local_path, positive, seed
from bico_ds.config.load import load_recipe
from bico_ds.config.resources import CHECKOUT
from bico_ds.evaluation.report.comparison import compare_runs
from bico_ds.evaluation.report.page.source import read_runs
from bico_ds.evaluation.report.page.verdict import answer_in_words
from bico_ds.evaluation.report.page.write import NAME, write_report
from bico_ds.runtime.launch_environment import free_port
from bico_ds.runtime.run_folder import RunFolder

COMPARED = ("tiny_bico", "tiny_ntp")
TASKS = ("n2d", "d2n", "n2d_reverse", "d2n_reverse")


def add_options(parser: ArgumentParser) -> None:
    add_training_options(parser)
    parser.add_argument(
        "--seeds", metavar="N", type=seed, nargs="+", help="train every seed into runs/seed-N"
    )


def add_training_options(parser: ArgumentParser) -> None:
    """What every command that trains `runs_from_base` asks."""
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=positive,
        default=2,
        help="processes to train with (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=local_path,
        default=Path("runs"),
        help="where the run folders go (default: %(default)s)",
    )


def demonstrate(options: Namespace) -> None:
    console = Console(soft_wrap=True)
    started = time.monotonic()
    if options.seeds is None:
        train_all(runs_from_base(COMPARED, options.runs, options.ranks), console)
        show(options.runs, console)
    else:
        folders = {seed: options.runs / f"seed-{seed}" for seed in options.seeds}
        runs = [
            run
            for seed, folder in folders.items()
            for run in runs_from_base(COMPARED, folder, options.ranks, seed=seed)
        ]
        train_all(runs, console)
        show_seeds(list(folders.values()), options.runs, console)
    console.print(f"The demo took {(time.monotonic() - started) / 60:.1f} minutes.", highlight=False)


def runs_from_base(
    recipes: Sequence[str], runs: Path, ranks: int, *, seed: int | None = None
) -> list[LocalRun]:
    """tiny_base, then each of `recipes` from it, into `runs`/RECIPE. `seed`: of the run and of its invented facts."""
    found = []
    for recipe in ("tiny_base", *recipes):
        overrides = [] if seed is None else [f"seed={seed}", f"data.facts.seed={seed}"]
        if recipe != "tiny_base":
            overrides.append(f"model.path={runs / 'tiny_base' / 'export'}")
        command = [
            *launched(ranks),
            "--recipe", recipe, "--output-dir", str(runs / recipe),
        ]  # fmt: skip
        for override in overrides:
            command += ["--set", override]
        found.append(
            LocalRun(
                name=recipe if seed is None else f"{recipe}, seed {seed}",
                folder=RunFolder(runs / recipe),
                command=command,
                steps=load_recipe(recipe, overrides).training.steps,
            )
        )
    return found


def train_all(runs: Sequence[LocalRun], console: Console) -> None:
    """Train the runs one after the other; one that is done already returns at once. Raises `SystemExit` where one fails."""
    console.print(
        "What the launcher and the ranks print: logs/launch-N.log in each run folder.", highlight=False
    )
    # The demo is a CPU demo, on GPU machines too: its recipes are fp32, which CUDA's flash kernels refuse.
    # DeepSpeed's launcher writes CUDA_VISIBLE_DEVICES anew for its ranks, so hiding the GPUs would not help.
    if code := train_in_turn(runs, {**os.environ, "DS_ACCELERATOR": "cpu"}, console):
        sys.exit(code)


def show(runs: Path, console: Console) -> None:
    """Both runs side by side on the four tasks, the answer in a sentence, and where there is more."""
    paths, output = [runs / name for name in COMPARED], runs / "demo"
    console.print()
    compare_runs(paths, output=output, brief=True, console=console)
    say = partial(console.print, highlight=False, markup=False)
    say(f"\n{answer_in_words(read_runs(paths))}\n")
    say(f"The report: {write_report(paths, output / NAME)}; more tables and pictures are beside it.")
    say(f"The curves: bico-ds tensorboard {runs}, or make tensorboard")


def show_seeds(folders: list[Path], runs: Path, console: Console) -> None:
    """Mean and worst of both runs over the seeds, as a table and as Markdown."""
    table = FittingTable(title=f"{len(folders)} seeds, mean (worst)")
    lines = ["| task | " + " | ".join(COMPARED) + " |", "|---|" + "---|" * len(COMPARED)]
    for column in ("task", *COMPARED):
        table.add_column(column, right=column != "task", whole=True)
    for task in TASKS:
        cells = []
        for name in COMPARED:
            scores = [final_score(folder / name, task) for folder in folders]
            worst = max(scores) if name == "tiny_ntp" and task.endswith("reverse") else min(scores)
            cells.append(f"{sum(scores) / len(scores):.3f} ({worst:.3f})")
        table.add_row(task, *cells)
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    console.print(table)
    path = runs / "demo-seeds.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"Written to {path}; the worst of tiny_ntp on the reverse tasks is its highest.")


def final_score(run: Path, task: str) -> float:
    """The headline metric of the last evaluation of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"][-1][f"evaluation/{task}/headline"]


def launched(ranks: int) -> list[str]:
    """The command that trains on so many processes, beside whatever else trains on this machine."""
    launcher = [deepspeed_launcher(), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, *training_program()]


def deepspeed_launcher() -> str:
    """The launcher of this Python's environment."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise RunError(
            f"no command `deepspeed` beside {sys.executable} or on PATH; install DeepSpeed for this Python"
        )
    return found


def training_program() -> list[str]:
    """What the launcher starts: a checkout's script takes the package beside it, whichever is installed."""
    if CHECKOUT is None:
        return ["--module", "bico_ds.commands.train"]
    return [str(CHECKOUT / "launch" / "train.py")]


main = Command(description=__doc__, add_options=add_options, run=demonstrate)


if __name__ == "__main__":
    main.start()
