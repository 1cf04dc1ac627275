"""Compile the DeepSpeed operations that a recipe needs, once, before its ranks start.

    native_ops.py RECIPE [--set …]

They go to TORCH_EXTENSIONS_DIR, where the ranks find them instead of waiting for one another.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import RECIPE_HELP, add_overrides_option, path_text
from bico_ds.config.load import load_recipe


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=path_text, help=RECIPE_HELP)
    add_overrides_option(parser)


def compile_operations(options: Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    from bico_ds.runtime.deepspeed_ops import build

    build(recipe)


main = Command(description=__doc__, add_options=add_options, run=compile_operations)


if __name__ == "__main__":
    main.start()
