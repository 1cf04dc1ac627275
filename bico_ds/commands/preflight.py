"""Check all nodes before a long run, in seconds; start it as the training will be started.

    bico-ds preflight --recipe tiny_base                                          this machine alone
    torchrun --nnodes 2 … -m bico_ds.commands.preflight --recipe …
    srun … python -m bico_ds.commands.preflight --recipe llama70b_bico            as the batch script does

Compares versions, program, recipe and data between the nodes, looks at disks, shared folders, clocks and GPUs, and
measures the network. With --proof also runs the attention backends of every node, on its first GPU (without one, on its
CPU), against an fp64 oracle: on new machines, and after a new driver or new versions. Exit codes: 0 ready, 1 refused
(the message names the node), 2 wrong usage or recipe, or ranks that cannot connect to each other.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import add_recipe_options, add_run_folder_option
from bico_ds.config.load import load_recipe
from bico_ds.proof.machine import checkout
from bico_ds.proof.prove import node_problems
from bico_ds.runtime import launch_environment
from bico_ds.runtime.run_folder import folder_of_run


def add_options(parser: ArgumentParser) -> None:
    add_recipe_options(parser)
    add_run_folder_option(parser)
    parser.add_argument(
        "--proof",
        action="store_true",
        help="also refuse a node whose attention backends are wrong (about a minute; from a checkout)",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=SUPPRESS)  # deepspeed's launcher adds it


def check_nodes(options: Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.proof:
        checkout()
    from bico_ds.cluster.preflight.check import preflight

    run = folder_of_run(recipe, options.output_dir)
    return 0 if preflight(recipe, run, node_problems=node_problems if options.proof else None) else 1


# The first rank of each node shows an error: a recipe may be missing on one of them.
main = Command(
    description=__doc__, add_options=add_options, run=check_nodes, rank=launch_environment.local_rank
)


if __name__ == "__main__":
    main.start()
