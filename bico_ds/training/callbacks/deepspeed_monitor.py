"""DeepSpeed's monitor (CSV, W&B), which its engine calls within a step: a failure there must not end it. Rank 0 only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bico_ds.common.appended_file import AppendedFile
from bico_ds.common.files import atomic_file
from bico_ds.model.deepspeed_engine import EventWriter
from bico_ds.training.callbacks.best_effort import BestEffort


def bear_failures(monitor: EventWriter, csv: Path, *, root: Path, until: int, effort: BestEffort) -> None:
    """Put writers that raise nothing in the place of those that DeepSpeed's `monitor` has; its CSV goes to the folder `csv`.

    `root`: the run folder, below which `csv` is. `until`: the step that the run goes on from; CSV lines of later ones go.
    """
    writers: dict[str, Any] = vars(monitor)
    if writers.get("csv_monitor") is not None:
        files = CsvFiles(csv, root=root)
        effort.attempt("csv", lambda: files.forget_after(until))
        writers["csv_monitor"] = _Bearing("csv", files, effort, errors=OSError)
    if writers.get("wandb_monitor") is not None:
        # Its client raises errors of its own, of networks, and of whatever the server says.
        writers["wandb_monitor"] = _Bearing("W&B", writers["wandb_monitor"], effort, errors=Exception)


class CsvFiles:
    """A CSV file per tag, as DeepSpeed's own writes them, but each line is in it as a whole or not at all."""

    enabled = True

    def __init__(self, folder: Path, *, root: Path) -> None:
        self._folder, self._root = folder, root
        self._files: dict[str, AppendedFile] = {}

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
        """Write (tag, value, step) to each one's file. Raises the first OSError after all were tried."""
        failures: list[OSError] = []
        for tag, value, step in event_list:
            file = self._file_of(tag)
            file.add(f"{step},{value}\r\n".encode())
            try:
                file.write_waiting()
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def forget_after(self, step: int) -> None:
        """Drop lines of later steps, which a resumed run writes again, and one that a crash cut. Raises OSError."""
        for path in self._folder.glob("*.csv"):
            head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
            kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_file(path) as temporary:
                    temporary.write_bytes(head + b"".join(kept))

    def _file_of(self, tag: str) -> AppendedFile:
        if tag not in self._files:
            path = self._folder / (tag.replace("/", "_").replace(" ", "_") + ".csv")
            head = f"step,{tag.rpartition('/')[2]}\r\n".encode()
            self._files[tag] = AppendedFile(path, root=self._root, head=head)
        return self._files[tag]


def _step_of(line: bytes) -> float:
    try:
        return int(line.partition(b",")[0])
    except ValueError:  # damage
        return math.inf


class _Bearing:
    """One of DeepSpeed's writers, named as the user knows it."""

    enabled = True

    def __init__(
        self, name: str, writer: EventWriter, effort: BestEffort, *, errors: type[Exception]
    ) -> None:
        self._name, self._writer, self._effort, self._errors = name, writer, effort, errors

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
        self._effort.attempt(self._name, lambda: self._writer.write_events(event_list), errors=self._errors)
