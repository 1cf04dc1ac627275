"""Make a split to search hyperparameters on, from the persons that no reversal test asks about.

    python tools/search_split.py NAME_DESCRIPTION_FOLDER OUTPUT_FOLDER

The name-description set (arXiv 2309.12288) trains 30 persons in both orders ("both"). Of these, the split keeps both
orders for the first half, and the texts with the name first for the second half, who become its N2D persons: the N2D and
N2D-reverse tests ask for them. The files written have the names that recipes and tools/evaluate.py expect.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path

Row = dict[str, Any]


def split(folder: Path, output: Path) -> dict[str, int]:
    """Write the split of `folder` to the new folder `output`; return the rows of each file. Raises `UserError`."""
    train, test = (_read(folder / f"both_prompts_{part}.jsonl") for part in ("train", "test"))
    names = _names(train + test)
    hidden = set(names[len(names) // 2 :])
    files = {
        "all_prompts_train": [
            row for row in train if _name_in(row["prompt"], names) or _answer(row, names) not in hidden
        ],
        "p2d_prompts_test": [row for row in test if _name_in(row["prompt"], names) in hidden],
        "p2d_reverse_prompts_test": [
            {**row, "completion": f" {_answer(row, names)}"} for row in test if _answer(row, names) in hidden
        ],
    }
    if output.exists():
        raise UserError(f"{output} exists; name a new folder")
    try:
        output.mkdir(parents=True)
        for name, rows in files.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return {name: len(rows) for name, rows in files.items()}


def _read(file: Path) -> list[Row]:
    if not file.is_file():
        raise UserError(
            f"{file} is missing; it is part of the name-description set (lberglund/reversal_curse)"
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row["prompt"], str) and isinstance(row["completion"], str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not a JSON object with `prompt` and `completion`") from None
        rows.append(row)
    return rows


def _names(rows: list[Row]) -> list[str]:
    """The persons, in the order of their first text: first and last name, where an answer starts with both in capitals
    and some prompt contains them.
    """
    prompts = "\n".join(row["prompt"] for row in rows)
    starts = [" ".join(row["completion"].split()[:2]) for row in rows]
    return list(dict.fromkeys(start for start in starts if start.istitle() and start in prompts))


def _name_in(text: str, names: list[str]) -> str | None:
    return next((name for name in names if name in text), None)


def _answer(row: Row, names: list[str]) -> str | None:
    """The name that answers a description-first row."""
    return next((name for name in names if row["completion"].strip().startswith(name)), None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=local_path, help="the name-description set")
    parser.add_argument("output", type=local_path)
    options = parser.parse_args()
    try:
        rows_of = split(options.folder, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, rows in rows_of.items():
        print(f"{options.output / name}.jsonl: {rows} rows")
    return 0
