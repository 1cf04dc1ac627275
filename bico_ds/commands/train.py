"""Train a recipe.

    deepspeed launch/train.py --recipe llama70b_bico
    deepspeed --num_accelerators 2 launch/train.py --recipe tiny_base      (on a CPU the launcher starts one unless told)
    python launch/train.py --recipe tiny_bico --dry-run

Exit codes: 0 finished, or stopped on request (state.json says which), with a checkpoint once a step was made; 2 wrong
usage or input; 1 failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from bico_ds.common.errors import RunError, UserError
from bico_ds.config.arguments import local_path, path_text
from bico_ds.config.load import list_recipes, load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.runtime import launch_environment
from bico_ds.runtime.launcher import follow_launcher
from bico_ds.runtime.signals import StopFlag


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", metavar="NAME|PATH", type=path_text, help="a name in recipes/ or a YAML file"
    )
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY.PATH=VALUE", action="append", default=[],
        help="override one key of the recipe, as in --set optimizer.lr=1e-4 (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=local_path,
        help="run folder (default: the recipe's, or runs/NAME)",
    )
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", type=path_text, default="auto",
        help="auto: the newest complete checkpoint of the run folder, if any (default); none: start anew, what was there is "
        "set aside; PATH: this checkpoint, or the newest complete one of this run folder",
    )  # fmt: skip
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="resume although data or recipe changed since the checkpoint; same as --set data.allow_change=true",
    )
    parser.add_argument("--max-minutes", type=float, metavar="M", help="checkpoint and stop after so long")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would run, train nothing"
    )
    parser.add_argument("--list-recipes", action="store_true", help="list the names in recipes/")
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the launcher injects it
    arguments = parser.parse_args()
    if not arguments.list_recipes and arguments.recipe is None:
        parser.error("--recipe is required; --list-recipes shows the names")
    if arguments.max_minutes is not None and arguments.max_minutes <= 0:
        parser.error("--max-minutes must be positive")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    if arguments.list_recipes:
        names = list_recipes() if launch_environment.rank() == 0 else {}
        for name, description in names.items():
            print(f"{name:{max(map(len, names))}}  {description}")
        return 0
    try:
        allowed = ["data.allow_change=true"] if arguments.allow_data_change else []
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *allowed])
        return run(recipe, arguments)
    except (UserError, RunError) as error:
        return complain(error)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # leaving in good order would wait for ranks that are gone


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Dry run or training. Handlers come before the heavy imports, which take seconds in which a signal may come."""
    if arguments.dry_run:
        from bico_ds.training.dry_run import dry_run

        dry_run(recipe, output_dir=arguments.output_dir)
        return 0
    stop = StopFlag()
    stop.install(recipe.distributed.preempt_signals)
    if arguments.max_minutes is not None:
        stop.limit(arguments.max_minutes)
    if launch_environment.is_launched():
        follow_launcher(stop)
    from bico_ds.training.start import train

    train(recipe, output_dir=arguments.output_dir, resume=arguments.resume, stop=stop)
    return 0


def complain(error: UserError | RunError) -> int:
    """One message from rank 0. The others end a moment later: the launcher kills all when the first one ends."""
    if launch_environment.rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return error.exit_code
