"""Make a split to search hyperparameters on, from the persons that no reversal test asks about.

    bico-ds search-split NAME_DESCRIPTION_FOLDER OUTPUT_FOLDER

The name-description set (arXiv 2309.12288) trains 30 persons in both orders ("both"). Of these, the split keeps both
orders for the first half, and the texts with the name first for the second half, who become its N2D persons: the N2D and
N2D-reverse tests ask for them. The files written have the names that recipes and `bico-ds evaluate` expect.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path

Record = dict[str, Any]


def split(folder: Path, output: Path) -> dict[str, int]:
    """Write the split of `folder` to the new folder `output`; return the records of each file. Raises `UserError`."""
    train, test = (_read(folder / f"both_prompts_{part}.jsonl") for part in ("train", "test"))
    names = _names(train + test)
    hidden = set(names[len(names) // 2 :])
    files = {
        "all_prompts_train": [
            record
            for record in train
            if _name_in(record["prompt"], names) or _answer(record, names) not in hidden
        ],
        "p2d_prompts_test": [record for record in test if _name_in(record["prompt"], names) in hidden],
        "p2d_reverse_prompts_test": [
            {**record, "completion": f" {_answer(record, names)}"}
            for record in test
            if _answer(record, names) in hidden
        ],
    }
    if output.exists():
        raise UserError(f"{output} exists; name a new folder")
    try:
        output.mkdir(parents=True)
        for name, records in files.items():
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return {name: len(records) for name, records in files.items()}


def _read(file: Path) -> list[Record]:
    if not file.is_file():
        raise UserError(
            f"{file} is missing; it is part of the name-description set (lberglund/reversal_curse)"
        )
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record["prompt"], str) and isinstance(record["completion"], str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not a JSON object with `prompt` and `completion`") from None
        records.append(record)
    return records


def _names(records: list[Record]) -> list[str]:
    """The persons, in the order of their first text.

    A name is the first two words of an answer, where both are capitalized and some prompt contains them.
    """
    prompts = "\n".join(record["prompt"] for record in records)
    starts = [" ".join(record["completion"].split()[:2]) for record in records]
    return list(dict.fromkeys(start for start in starts if start.istitle() and start in prompts))


def _name_in(text: str, names: list[str]) -> str | None:
    return next((name for name in names if name in text), None)


def _answer(record: Record, names: list[str]) -> str | None:
    """The name that answers a description-first record."""
    return next((name for name in names if record["completion"].strip().startswith(name)), None)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=local_path, help="the name-description set")
    parser.add_argument("output", type=local_path, help="the folder to write; must be new")


def run(options: Namespace) -> None:
    for name, count in split(options.folder, options.output).items():
        print(f"{options.output / name}.jsonl: {count} records")


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
