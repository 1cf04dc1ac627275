"""The curves of earlier starts, written anew where TensorBoard's files do not have them under today's tags. Rank 0 only.

metrics.jsonl has every number of a run, and keeps its keys; event files of a run begun before have other tags, and would
stay beside today's as curves of their own.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_file
from bico_ds.common.json_files import is_number, object_in
from bico_ds.evaluation.results import load_result
from bico_ds.runtime.run_folder import RunFolder, split_metrics
from bico_ds.training.callbacks.tensorboard.event_file import has_todays_tags, write_events

# Of event files that are read for the times in them; those of larger ones are not worth the wait.
_MOST_BYTES = 1 << 26
_HEADLINE = re.compile("evaluation/(.+)/headline")

Values = Callable[[str, Mapping[str, float]], Sequence[Summary.Value]]


def renew(folder: RunFolder, until: int, values: Values, tell: Callable[[str], None]) -> None:
    """Write the history up to step `until`, unless all event files are of today's tags; those of before go to a replaced-N/.

    `values`: what the numbers of a kind are in TensorBoard. Raises OSError; called again, it does what is left.
    """
    files = _event_files(folder)
    if files and all(map(has_todays_tags, files)):
        return
    times = _times(files)
    if files:
        aside = folder.new_aside() / folder.tensorboard.name
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        tell(
            f"TensorBoard's curves are written anew, under today's names; the files of before are kept in {aside}"
        )
    lines = _lines(folder.metrics_file, until)
    if lines:
        folder.tensorboard.mkdir(exist_ok=True)
        write_events(folder.tensorboard, _events(folder, lines, values, times))


def _lines(metrics: Path, until: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to a step, in the order of steps; of several of one kind and step the last one."""
    kept, _ = split_metrics(metrics, until)
    found = {}
    for line in kept:
        if (written := object_in(line, metrics)) is not None:
            found[int(written["step"]), str(written.get("kind"))] = written
    return [found[step, kind] for step, kind in sorted(found) if step >= 0]


def _events(
    folder: RunFolder, lines: Sequence[dict[str, Any]], values: Values, times: Mapping[int, float]
) -> Iterator[Event]:
    now = time.time()
    for line in lines:
        step = int(line["step"])
        numbers = {key: float(value) for key, value in line.items() if key != "step" and is_number(value)}
        numbers = _bounds(folder.evaluation_file(step), numbers) | numbers
        now = times.get(step, now)
        yield Event(wall_time=now, step=step, summary=Summary(value=values(str(line.get("kind")), numbers)))


def _bounds(file: Path, numbers: Mapping[str, float]) -> dict[str, float]:
    """The bounds of the headline scores among these numbers that a line of before lacks, from its evaluation's file.

    Where the file does not tell, those between which every score is: TensorBoard draws no interval of a curve, and no curve,
    that lacks one at some step.
    """
    lacking = [
        task[1]
        for key in numbers
        if (task := _HEADLINE.fullmatch(key)) is not None and f"{key}_low" not in numbers
    ]
    try:
        tasks = load_result(file).tasks if lacking else {}
    except UserError:
        tasks = {}
    found = {}
    for name in lacking:
        known = tasks[name].interval if name in tasks else None
        for end, bound in zip(("low", "high"), known or (0.0, 1.0), strict=True):
            found[f"evaluation/{name}/headline_{end}"] = bound
    return found


def _times(files: Sequence[Path]) -> dict[int, float]:
    """When each step was written, in seconds since 1970, as far as these event files tell."""
    times: dict[int, float] = {}
    for path in files:
        if path.stat().st_size <= _MOST_BYTES:
            times |= {
                event.step: event.wall_time for event, _ in _records(path.read_bytes()) if event.summary.value
            }
    return times


def forget_after(folder: RunFolder, step: int) -> None:
    """Take the events of later steps out of the files of earlier starts. Raises OSError.

    What a new file begins with hides curves and pictures of them, but no text, and not from every program that reads these
    files.
    """
    for path in _event_files(folder):
        content = path.read_bytes()
        kept = [
            record
            for event, record in _records(content)
            if event.WhichOneof("what") == "file_version" or event.step <= step
        ]
        if len(kept) < 2:
            path.unlink()
        elif sum(map(len, kept)) < len(content):
            with atomic_file(path) as temporary:
                temporary.write_bytes(b"".join(kept))


def _event_files(folder: RunFolder) -> list[Path]:
    return sorted(path for path in folder.tensorboard.glob("*tfevents*") if path.is_file())


def _records(content: bytes) -> Iterator[tuple[Event, bytes]]:
    """The events of a file up to what is none, each with its record: length (8 bytes), checksum (4), event, checksum (4)."""
    at = 0
    while at + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        record = content[at : at + 16 + length]
        try:
            event = Event.FromString(record[12 : 12 + length])
        except DecodeError:
            return
        if len(record) < 16 + length:  # a crash cut it
            return
        yield event, record
        at += 16 + length
