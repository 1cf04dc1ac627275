"""Command-line arguments: their types, and the options that several commands have.

Each type raises `argparse.ArgumentTypeError`, which argparse shows as one message.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.config.bounds import Bound
from bico_ds.config.grid import Axis, parse_axis
from bico_ds.config.paths import FolderOrHubName, LocalPath
from bico_ds.config.section import SEED

Number = TypeVar("Number", int, float)
_MOST, _COUNTS = 2**31 - 1, "it counts things that are at hand"
_MOST_SHOWN = 60
RECIPE_HELP = "a name in recipes/ or a YAML file"


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _within(Bound(least=1, most=_MOST, why=_COUNTS), whole(text))


def token_count(text: str) -> int:
    """An integer of at least 1, of any size that texts have."""
    return _within(Bound(least=1, most=10**18, why="it counts tokens of texts"), whole(text))


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    return _within(Bound(least=0, most=_MOST, why=_COUNTS), whole(text))


def seed(text: str) -> int:
    """An integer of 64 bits, signed or not."""
    return _within(SEED, whole(text))


def positive_number(text: str) -> float:
    """A number of minutes, seconds or gigabytes."""
    return _within(Bound(least=1e-6, most=1e6, why="nothing here is as small, or as large"), number(text))


def number(text: str) -> float:
    """A finite number; who takes it has bounds of its own."""
    return _within(Bound(why="it is a quantity"), _read(float, text, "a number"))


def local_path(text: str) -> Path:
    """A file or folder; `~` and `${NAME}` are expanded."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """What may be a path, or else a pattern or a name; `~` and `${NAME}` are expanded."""
    return _checked(text, LocalPath.expanded)


def written_path(text: str) -> LocalPath:
    """A file or folder of another machine, where `~` and `${NAME}` will be expanded."""
    _checked(text, LocalPath.in_shell)
    return LocalPath(text)


def folder_or_hub_name(text: str) -> FolderOrHubName:
    """A folder with a model or tokenizer, or its name on the hub; refused where it cannot be expanded here."""
    path_text(text)
    return FolderOrHubName(text)


def add_recipe_options(
    options: argparse._ActionsContainer, *, required: bool = True, several: bool = False
) -> None:
    """`--recipe`, which takes `several` names or one, and `--set`, as `recipe` and `overrides`."""
    options.add_argument(
        "--recipe",
        metavar="NAME|PATH",
        type=path_text,
        required=required,
        nargs="+" if several else None,
        help=RECIPE_HELP + ("; several: runs of each" if several else ""),
    )
    add_overrides_option(options)


def add_overrides_option(options: argparse._ActionsContainer) -> None:
    """`--set`, as `overrides`."""
    options.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        help="override one key of the recipe, as in --set optimizer.lr=1e-4 (repeatable)",
    )


def grid_axis(text: str) -> Axis:
    """A key of the recipe with the values that it takes in turn."""
    try:
        return parse_axis(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_grid_option(options: argparse._ActionsContainer, *, required: bool = False) -> None:
    """`--grid`, as `grid`, a list of axes."""
    options.add_argument(
        "--grid",
        metavar="KEY.PATH=VALUE,VALUE",
        type=grid_axis,
        action="append",
        required=required,
        default=[],
        help="a run for each of these values, and with several --grid for each combination, as in --grid "
        "optimizer.lr=1e-5,2e-5 --grid seed=1,2,3; a value that is a list stands in brackets",
    )


def add_run_folder_option(options: argparse._ActionsContainer, *, several: bool = False) -> None:
    """`--output-dir`; where a command makes `several` runs, the folder that holds theirs."""
    options.add_argument(
        "--output-dir",
        metavar="DIR",
        type=local_path,
        help="run folder (default: the recipe's, or runs/NAME)"
        + ("; of a job array, the folder that holds them (default: runs/sweep-NAME)" if several else ""),
    )


def _checked(text: str, expanded: Callable[[LocalPath], str]) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expanded(LocalPath(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(text: str) -> int:
    """An integer; who takes it has bounds of its own."""
    return _read(int, text, "an integer")


def _read(kind: Callable[[str], Number], text: str, called: str) -> Number:
    """Python takes the digits of every script, and all but `²` of what `str.isdigit` calls so."""
    try:
        if text.isascii():
            return kind(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{on_one_line(text, most=_MOST_SHOWN)}' is not {called}")


def _within(bound: Bound, value: Number) -> Number:
    if (problem := bound.problem(value)) is not None:
        raise argparse.ArgumentTypeError(problem)
    return value
