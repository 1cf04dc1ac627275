"""Compile the DeepSpeed operations that a recipe needs, once, before its ranks start: native_ops.py RECIPE
[--set …]

They land in TORCH_EXTENSIONS_DIR. Ranks that come later find them there, instead of waiting for one another.
"""

from __future__ import annotations

import argparse
import sys

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import path_text
from bico_ds.config.load import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=path_text, help="a name in recipes/ or a YAML file")
    parser.add_argument("--set", dest="overrides", metavar="KEY.PATH=VALUE", action="append", default=[])
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from bico_ds.runtime.native_ops import build

        build(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
