"""Check all nodes before a long run, in seconds; start it as the training will be started.

    srun … launch/preflight.py --recipe llama70b_bico --output-dir runs/llama70b    (the batch script does it)
    torchrun --nnodes 2 … launch/preflight.py --recipe …
    python launch/preflight.py --recipe tiny_base                                   (this machine alone)

Compares versions, program, recipe and data between the nodes, looks at disks, shared folders, clocks and
GPUs, and measures the network. Exit codes: 0 ready, 1 refused (the message names the node), 2 wrong usage or
recipe, or ranks that cannot meet.
"""

from __future__ import annotations

import argparse
import sys

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path, path_text
from bico_ds.config.load import load_recipe
from bico_ds.runtime import launch_environment
from bico_ds.runtime.run_folder import folder_of_run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|PATH",
        type=path_text,
        required=True,
        help="a name in recipes/ or a YAML file",
    )
    parser.add_argument("--set", dest="overrides", metavar="KEY.PATH=VALUE", action="append", default=[])
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=local_path,
        help="run folder (default: the recipe's, or runs/NAME)",
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the launcher injects it
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from bico_ds.cluster.preflight.check import preflight

        return 0 if preflight(recipe, folder_of_run(recipe, arguments.output_dir)) else 1
    except UserError as error:
        if launch_environment.local_rank() == 0:  # of each node: a recipe may be missing on one of them
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
