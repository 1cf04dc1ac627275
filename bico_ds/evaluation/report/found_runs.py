"""Where runs are: a folder of runs, as a sweep makes it, stands for all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

RUN_FILES = ("recipe.yaml", "run.json", "state.json", "metrics.jsonl")


def is_run_folder(path: Path) -> bool:
    """Whether a folder has a file that every run has from some moment on."""
    return any(os.path.lexists(path / name) for name in RUN_FILES)


def runs_in(path: Path) -> list[Path]:
    """The run folders directly in a folder that is no run folder itself, by name, numbers in them by size.

    Empty for everything else.
    """
    if not path.is_dir() or is_run_folder(path):
        return []
    return sorted((inner for inner in path.iterdir() if inner.is_dir() and is_run_folder(inner)), key=_order)


def _order(path: Path) -> list[tuple[float, str]]:
    """`seed=2` before `seed=10`."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", path.name)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def expanded(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """The runs that these paths name, and whether each was found in a folder of runs; one that is none is left as it is."""
    for path in paths:
        found = runs_in(path)
        yield from ((inner, True) for inner in found) if found else ((path, False),)
