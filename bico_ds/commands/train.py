"""Train a recipe.

    deepspeed launch/train.py --recipe llama70b_bico                       from a checkout
    deepspeed --module bico_ds.commands.train --recipe llama70b_bico       from an installed package
    bico-ds train --recipe tiny_bico --dry-run                             one process, no launcher

On a CPU machine the launcher starts one rank unless told: `deepspeed --num_accelerators 2 …`. Exit codes: 0
finished, or stopped on request (state.json says which), with a checkpoint once a step was made; 2 wrong usage or
input; 1 failure.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from bico_ds.common.command_line import Command
from bico_ds.common.errors import RunError, UserError
from bico_ds.common.patient_output import outlive_full_disks
from bico_ds.config.arguments import add_recipe_options, add_run_folder_option, path_text, positive_number
from bico_ds.config.load import dump_recipe, list_recipes, load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.runtime import launch_environment
from bico_ds.runtime.launcher import follow_launcher
from bico_ds.runtime.output.process_output import ProcessOutput, libraries_apart
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.profile.request import profile_request


def add_options(parser: ArgumentParser) -> None:
    add_recipe_options(parser, required=False)
    add_run_folder_option(parser)
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", type=path_text, default="auto",
        help="auto: the newest complete checkpoint of the run folder, if any (default); none: start anew, what was there "
        "is set aside; PATH: this checkpoint, or the newest complete one of this run folder. A checkpoint is trusted input: "
        "reading it can run code",
    )  # fmt: skip
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="resume although data or recipe changed since the checkpoint; same as --set data.allow_change=true",
    )
    parser.add_argument(
        "--max-minutes",
        type=positive_number,
        metavar="M",
        help="save a checkpoint and stop after so many minutes",
    )
    parser.add_argument(
        "--profile", metavar="STEP[:STEPS]", type=profile_request,
        help="record where STEPS steps from STEP on go, into the run's profile/: a trace for Perfetto from each rank, and a "
        "table. STEP alone: from there one step of each objective, looked for in 50 steps. Recorded steps are slower",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would run, train nothing"
    )
    parser.add_argument(
        "--print-recipe", action="store_true",
        help="print the resolved recipe as YAML, every key but secrets, and end; with --dry-run below what that prints",
    )  # fmt: skip
    parser.add_argument("--list-recipes", action="store_true", help="list the names in recipes/")
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        "--quiet", action="store_const", const="quiet", dest="verbosity", default="normal",
        help="show warnings, evaluations and the end alone; RUN/logs/rank-N.log has the rest",
    )  # fmt: skip
    told.add_argument(
        "--verbose", action="store_const", const="verbose", dest="verbosity",
        help="show what libraries log and print, too",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=None, help=SUPPRESS)  # deepspeed's launcher adds it


def contradiction(options: Namespace) -> str | None:
    if not options.list_recipes and options.recipe is None:
        return "--recipe is required; --list-recipes shows the names"
    if options.print_recipe and options.profile is not None:
        return "--print-recipe trains nothing that --profile could record"
    if options.dry_run and options.profile is not None:
        return "--dry-run makes no step that --profile could record"
    return None


def run(options: Namespace) -> None:
    """List the recipes, or load one and plan or train it. A failure in training ends this process at once."""
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if options.list_recipes:
        show_recipes()
        return
    allowed = ["data.allow_change=true"] if options.allow_data_change else []
    recipe = load_recipe(options.recipe, [*options.overrides, *allowed])
    if options.dry_run:
        with libraries_apart():
            from bico_ds.training.dry_run import dry_run

        dry_run(recipe, output_dir=options.output_dir)
    if options.print_recipe and launch_environment.rank() == 0:
        print(dump_recipe(recipe), end="")
    if only_shows(options):
        return
    try:
        train_recipe(recipe, options)
    except (UserError, RunError):
        raise
    except Exception:
        try:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)  # leaving in good order would wait for ranks that are gone


def only_shows(options: Namespace) -> bool:
    return options.list_recipes or options.dry_run or options.print_recipe


def show_recipes() -> None:
    names = list_recipes() if launch_environment.rank() == 0 else {}
    for name, description in names.items():
        print(f"{name:{max(map(len, names))}}  {description}")


def train_recipe(recipe: Recipe, options: Namespace) -> None:
    """Handlers come before the heavy imports, which take seconds in which a signal may come."""
    launch_environment.check()
    stop = StopFlag()
    stop.install(recipe.distributed.preempt_signals)
    if options.max_minutes is not None:
        stop.limit(options.max_minutes)
    if launch_environment.is_launched():
        follow_launcher(stop)
    with ProcessOutput(options.verbosity, rank=launch_environment.rank()) as output:
        outlive_full_disks()
        with libraries_apart(), _no_garbage():
            from bico_ds.training.start import train
        output.adopt_libraries()
        train(
            recipe,
            output_dir=options.output_dir,
            resume=options.resume,
            stop=stop,
            output=output,
            profile=options.profile,
        )


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Imports leave none; Python's collector would look for it as they go, for a fifth of their time, and ever after."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


main = Command(
    description=__doc__,
    add_options=add_options,
    contradiction=contradiction,
    run=run,
    only_shows=only_shows,
    rank=launch_environment.telling_rank,
)


if __name__ == "__main__":
    main.start()
