"""What the report reads of a run: all that can be read, and what is wrong with the rest."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, is_number, object_in, read_object_lines
from bico_ds.common.secrets import text_without_secrets, without_secrets
from bico_ds.common.yaml_files import read_mapping
from bico_ds.evaluation.report.found_runs import RUN_FILES, expanded, is_run_folder
from bico_ds.evaluation.report.page.numbers import amount
from bico_ds.evaluation.report.runs import (
    ComparedRun,
    Line,
    Work,
    labels_of,
    run_of_file,
    run_of_folder,
    work_of,
)
from bico_ds.evaluation.results import EvaluationResult, read_result, result_in
from bico_ds.runtime.run_folder import RunFolder, read_starts, read_state

Value = TypeVar("Value")

# Keys of which curves or medians are shown. A run may have a hundred thousand lines of forty keys.
_CURVES = ("loss/", "speed/", "memory/")
_MOST_STEPS, LARGEST = 1 << 53, 1e30  # what is larger is damage, and would be all that a curve shows
_MOST_FAULTS = 5  # of a run: damage of a disk may be in thousands of lines


class Series(NamedTuple):
    """What was logged under one key: steps, and the values at them."""

    steps: array[int]
    values: array[float]


@dataclass
class Logged:
    """A metrics.jsonl.

    `series`: by key, of lines of training. `last`: the last of these. `other`: all other lines.
    """

    series: dict[str, Series] = field(default_factory=dict)
    other: list[Line] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, line: str, place: str, path: Path) -> None:
        record = object_in(line, path)
        step = (record or {}).get("step")
        if record is None or type(step) is not int or not 0 <= step < _MOST_STEPS:
            self.unreadable += 1
        elif record.get("kind") == "train":
            self.last = record
            for key, value in record.items():
                if key.startswith(_CURVES) and is_number(value) and abs(value) < LARGEST:
                    series = self.series.setdefault(key, Series(array("q"), array("d")))
                    series.steps.append(step)
                    series.values.append(value)
        else:
            self.other.append((place, record))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for _, record in self.other if record.get("kind") == kind]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run folder, or a result file of `bico-ds evaluate` (`folder` is None).

    `recipe`: without secrets; empty where it is not known. `starts`: of run.json, oldest first; `attempts`: of a batch
    system. `faults`: what could not be read, each a sentence.
    """

    label: str
    path: Path
    folder: RunFolder | None
    compared: ComparedRun
    logged: Logged
    recipe: dict[str, Any]
    starts: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    state: dict[str, Any]
    model: str
    faults: list[str]

    @property
    def work(self) -> Work | None:
        """What it had done by the last line that says so."""
        return work_of(self.logged.last) or self.compared.work


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read run folders, folders of runs, and result files.

    Raises `UserError` for a path that is neither, and a run that is named twice; a file of a run that is broken is a fault.
    """
    places = [path for path, _ in expanded(paths)]
    return [
        _read_file(path, label) if path.is_file() else _read_folder(path, label)
        for path, label in zip(places, labels_of(places), strict=True)
    ]


def _read_file(path: Path, label: str) -> ReportedRun:
    values = read_result(path)
    final = (
        result_in(values, path)
        if "tasks" in values
        else EvaluationResult(tasks={}, held_out=values.get("held_out", {}))
    )
    return ReportedRun(
        label=label,
        path=path,
        folder=None,
        compared=run_of_file(values, path, label, final),
        logged=Logged(),
        recipe={},
        starts=[],
        attempts=[],
        state={},
        model=text_without_secrets(str(values.get("model", ""))),
        faults=[],
    )


def _read_folder(path: Path, label: str) -> ReportedRun:
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or result file")
    if not is_run_folder(path):
        raise UserError(f"{path}: no run folder, it has none of {', '.join(RUN_FILES)}")
    folder, faults = RunFolder(path), _Faults(path)
    logged = faults.reading(folder.metrics_file, _read_metrics, Logged())
    if logged.unreadable:
        faults.note(f"{folder.metrics_file.name}: {amount(logged.unreadable, 'damaged line')} left out")
    recipe: dict[str, Any] = faults.reading(
        folder.recipe_file, lambda file: read_mapping(file, "no recipe").values, {}
    )
    nothing: list[dict[str, Any]] = []
    attempts = faults.reading(path / "slurm" / "attempts.jsonl", read_object_lines, nothing)
    if read_state(folder.state_file) is None and os.path.lexists(folder.state_file):
        faults.note(f"{folder.state_file.name}: damaged")
    return ReportedRun(
        label=label,
        path=path,
        folder=folder,
        compared=run_of_folder(
            folder, label, [*logged.other, ("", logged.last)], lambda error: faults.note(str(error))
        ),
        logged=logged,
        recipe=without_secrets(recipe),
        starts=without_secrets(faults.reading(folder.run_file, read_starts, nothing)),
        attempts=without_secrets(attempts),
        state=without_secrets(read_state(folder.state_file) or {}),
        model=str(path / "export"),
        faults=faults.told,
    )


def _read_metrics(path: Path) -> Logged:
    """Line by line: the file may be larger than memory. Raises OSError."""
    logged = Logged()
    for number, line in enumerate(_complete_lines(path), start=1):
        if line.strip():
            logged.add(line, f"{path}:{number}", path)
    return logged


def _complete_lines(path: Path) -> Iterator[str]:
    """The last line may be half written."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise JsonError(path, "not a regular file")
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        yield from (line for line in file if line.endswith("\n"))


class _Faults:
    """What is wrong with the files of a run, the first few in words."""

    def __init__(self, run: Path) -> None:
        self.told: list[str] = []
        self._run, self._count = run, 0

    def note(self, fault: str) -> None:
        self._count += 1
        if self._count <= _MOST_FAULTS:
            self.told.append(text_without_secrets(fault.replace(f"{self._run}{os.sep}", "")))
        elif self._count == _MOST_FAULTS + 1:
            self.told.append("and more")

    def reading(self, file: Path, work: Callable[[Path], Value], otherwise: Value) -> Value:
        """What `work` makes of a file; `otherwise` of one that is missing, or broken, which is noted."""
        try:
            return work(file) if os.path.lexists(file) else otherwise
        except OSError as error:
            self.note(f"{file.name}: {error.strerror}")
        except (JsonError, UserError) as error:
            self.note(f"{file.name}: {str(error).removeprefix(f'{file}: ')}")
        return otherwise
