"""Train a recipe at every point of a grid on this machine, some runs at a time.

    bico-ds sweep --recipe tiny_bico --grid objectives.bico.mask.rate=0.15,0.3 --grid seed=1,2,3
    bico-ds sweep --recipe tiny_bico tiny_ntp --grid seed=1,2,3 --jobs 2
    bico-ds sweep … --dry-run                 check every run, list them, train nothing

Every run has a folder below runs/sweep-NAME, named by its values, as tiny_bico+rate=0.15+seed=1. All are checked before
the first begins. The same command passes over runs that are done, goes on with those that were stopped, and tries again
those that failed; with more values it adds their runs, and keeps the others. A folder that holds a run of another recipe is
refused. The same --grid makes the job array of bico-ds submit. Exit codes: 0 all are done, 1 some failed (the others went
on), 2 wrong usage or input.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from bico_ds.cluster.local.forecast import LocalRun
from bico_ds.cluster.local.in_turn import about
from bico_ds.cluster.local.shares import Share, divide, visible_gpus
from bico_ds.cluster.local.side_by_side import Failure, Started, train_side_by_side
from bico_ds.cluster.preflight.inputs import missing_inputs
from bico_ds.cluster.submission import refuse_if_alive
from bico_ds.cluster.sweep import (
    SweptRun,
    is_done,
    list_sweep,
    read_sweep,
    recipe_file,
    refuse_changed,
    refuse_rewritten,
    sweep_folder,
    write_sweep,
)
from bico_ds.commands.demo import deepspeed_launcher, training_program
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import secret_keys, text_without_secrets
from bico_ds.config.arguments import add_grid_option, add_recipe_options, local_path, positive
from bico_ds.config.resources import CHECKOUT
from bico_ds.runtime.launch_environment import free_port, usable_cores
from bico_ds.runtime.output.process_output import libraries_apart
from bico_ds.runtime.run_folder import RunFolder, read_state


def add_options(parser: ArgumentParser) -> None:
    add_recipe_options(parser, several=True)
    add_grid_option(parser, required=True)
    parser.add_argument(
        "--jobs", metavar="N", type=positive, default=1,
        help="runs at a time, among which GPUs and cores are divided (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", metavar="N", type=positive,
        help="processes of each run (default: the recipe's distributed.world_size, else one per GPU, one without GPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", metavar="DIR", type=local_path,
        help="folder that holds the runs (default: runs/sweep-NAME)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check every run, list them, train nothing")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The checked runs; `standing` says in words how far each is, and is empty of one that has not begun."""

    folder: Path
    runs: Sequence[SweptRun]
    standing: dict[str, str]
    shares: Sequence[Share]

    @property
    def to_do(self) -> list[SweptRun]:
        return [run for run in self.runs if self.standing[run.name] != "done"]


def sweep(options: Namespace) -> int:
    console = Console(soft_wrap=True)
    planned = make_sweep(options)
    show_runs(planned, console, all_of_them=options.dry_run)
    if options.dry_run:
        return 0
    launcher = deepspeed_launcher()
    write_sweep(planned.folder, planned.runs)
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    swept = {run.name: run for run in planned.to_do}

    def begin(run: LocalRun, place: int) -> Started:
        refuse_rewritten(planned.folder, swept[run.name])
        share = planned.shares[place]
        return [*share.launcher_words(launcher, free_port()), *run.command], share.environment(os.environ)

    runs = [local_run(planned.folder, run) for run in planned.to_do]
    failures = train_side_by_side(runs, places=len(planned.shares), begin=begin, console=console)
    return tell_end(planned, failures, time.monotonic() - began, console)


def _interrupt(*_: object) -> NoReturn:
    """A SIGTERM ends the runs in good order, as Ctrl-C does."""
    raise KeyboardInterrupt


def make_sweep(options: Namespace) -> Sweep:
    """The sweep, with everything checked that can be known before the first run. Raises `UserError`."""
    runs = list_sweep(options.recipe, options.overrides, options.grid)
    folder = sweep_folder(options.output_dir, runs)
    read_sweep(folder)
    refuse_changed(folder, runs)
    refuse_if_alive(folder / run.name for run in runs)
    refuse_missing(runs, dry_run=options.dry_run)
    with libraries_apart():
        import torch
    made_for = {run.recipe.distributed.world_size for run in runs}
    ranks = options.ranks or (made_for.pop() if len(made_for) == 1 else None)
    gpus = visible_gpus(torch.cuda.device_count(), os.environ)
    shares = divide(options.jobs, ranks=ranks, gpus=gpus, cores=usable_cores())
    for run in runs:
        check(run, folder / run.name, shares[0], dry_run=options.dry_run)
    standing = {run.name: standing_of(folder / run.name) for run in runs}
    return Sweep(folder=folder, runs=runs, standing=standing, shares=shares)


def refuse_missing(runs: Sequence[SweptRun], *, dry_run: bool) -> None:
    """Raise `UserError` for the first input that is not here, or a secret; a dry run prints a note for each."""
    problems = [problem for run in runs for problem in (*missing_inputs(run.recipe), *_secrets_in(run))]
    for problem in dict.fromkeys(problems):
        if not dry_run:
            raise UserError(problem)
        print(f"note: training would be refused: {text_without_secrets(problem)}", file=sys.stderr)


def _secrets_in(run: SweptRun) -> list[str]:
    return [
        f"{key}: a secret, and the recipes that a sweep keeps hold none; let the code that needs it read the environment, "
        "or write ${NAME} where it is part of a path"
        for key in secret_keys(run.recipe.model_dump(mode="json"))
        if key != "description"
    ]


def check(run: SweptRun, folder: Path, share: Share, *, dry_run: bool) -> None:
    """Raise `UserError`, with the run's name, for what its start would refuse; a dry run needs no model."""
    with libraries_apart():
        from bico_ds.data.replay.source import check_sampled
        from bico_ds.training.checks import check_recipe, without_missing_model
    recipe, problem = without_missing_model(run.recipe) if dry_run else (run.recipe, None)
    try:
        check_recipe(
            recipe,
            world_size=share.ranks,
            on_cuda=bool(share.gpus),
            run_folder=folder,
            ranks_per_node=share.ranks,
        )
        if problem is None:
            check_sampled(recipe)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def standing_of(run: Path) -> str:
    """How far a run is, in words; empty where it has not begun."""
    if is_done(run):
        return "done"
    state = read_state(RunFolder(run).state_file)
    if state is None:
        return ""
    ended = "failed" if state.get("state") == "failed" else "was stopped"
    return f"{ended}, step {state.get('step') or 0:,}"


def show_runs(planned: Sweep, console: Console, *, all_of_them: bool) -> None:
    """The runs in a line; of a dry run a line for each, too."""
    done = len(planned.runs) - len(planned.to_do)
    begun = sum(bool(planned.standing[run.name]) for run in planned.to_do)
    counts = [(done, "done"), (begun, "to go on with"), (len(planned.to_do) - begun, "new")]
    words = ", ".join(f"{count} {word}" for count, word in counts if count)
    shares = dict.fromkeys(map(str, planned.shares))
    lines = [
        f"{len(planned.runs)} runs in {planned.folder}: {words}",
        f"{len(planned.shares)} at a time: {'; '.join(shares)}",
    ]
    if all_of_them:
        width = max(len(run.name) for run in planned.runs)
        lines += [f"  {run.name:{width}}  {planned.standing[run.name] or 'new'}" for run in planned.runs]
        lines.append("dry run: all were checked, nothing is written or trained")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def local_run(folder: Path, run: SweptRun) -> LocalRun:
    """The run with the part of its command that no place changes."""
    place = folder / run.name
    words = ["--recipe", str(recipe_file(folder, run)), "--output-dir", str(place)]
    return LocalRun(
        name=run.name,
        folder=RunFolder(place),
        command=[*training_program(), *words],
        steps=run.recipe.training.steps,
    )


def tell_end(planned: Sweep, failures: Sequence[Failure], seconds: float, console: Console) -> int:
    """What is done, what failed, and how to compare; returns the exit code."""
    done = len(planned.runs) - len(failures)
    trained = len(planned.to_do) - len(failures)
    took = f"; {trained} in {about(seconds)}" if trained else ""
    console.print(
        f"{done} of {len(planned.runs)} runs are done{took}: {planned.folder}", highlight=False, markup=False
    )
    if failures:
        print(
            f"{len(failures)} failed; the same command tries again, after the cause is mended:",
            file=sys.stderr,
        )
        for failure in failures:
            error = next(iter(failure.lines[1 if failure.log else 0 :]), "")
            print(f"  {failure.run.name}: {error}\n    {failure.log or ''}".rstrip(), file=sys.stderr)
    if done:
        program = "bico-ds compare"
        if CHECKOUT is not None:
            program = f"python {shlex.quote(f'{CHECKOUT}/tools/compare.py')}"
        console.print(
            f"compare them: {program} {shlex.quote(str(planned.folder))}", highlight=False, markup=False
        )
    return 1 if failures else 0


main = Command(
    description=__doc__, add_options=add_options, run=sweep, only_shows=lambda options: options.dry_run
)


if __name__ == "__main__":
    main.start()
