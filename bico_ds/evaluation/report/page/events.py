"""The section of what happened to each run: starts, checkpoints, evaluations, failures, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bico_ds.common.json_files import JsonError, is_number, read_object
from bico_ds.common.printable import on_one_line
from bico_ds.evaluation.report.page.html import Html, element, section, table
from bico_ds.evaluation.report.page.numbers import amount, seconds
from bico_ds.evaluation.report.page.scores import figure_of
from bico_ds.evaluation.report.page.source import ReportedRun

_MOST_EVENTS = 60  # of a run
_MOST_CHARACTERS = 300
_LATEST = 4e9  # seconds since 1970 that a date can be made of
_LEFT_BY_FAILURES = {
    "nonfinite-step-*.json": "a step whose loss or gradient was not finite",
    "spike-step-*.json": "a spike of loss or norm",
    "stacks-rank-*.txt": "stacks of a rank that hung or was told to show them",
}
_STATES = {"done": "done", "running": "running", "preempted": "stopped and saved", "failed": "failed"}


class _Event(NamedTuple):
    """`when`: seconds since 1970, or None; `is_rare`: shown however many there are."""

    what: str
    step: int | None
    when: float | None
    more: str = ""
    is_rare: bool = False


def events(runs: Sequence[ReportedRun]) -> Html | None:
    """A table for each run; None where nothing is known of any."""
    tables = [found for run in runs if (found := _table(run)) is not None]
    if not tables:
        return None
    said = "Times are in UTC, and stand where a file of the run has one."
    return section("events", "What happened", element("p", said, class_="soft"), *tables)


def _table(run: ReportedRun) -> Html | None:
    found = _ordered([*_starts(run), *_steps(run)]) + list(_end(run))
    if not found:
        return None
    shown = _thinned(found)
    left_out = len(found) - len(shown)
    caption = run.label + (
        f"; {left_out} checkpoints and evaluations between are left out" if left_out else ""
    )
    rows = [
        (event.what, "–" if event.step is None else f"{event.step:,}", moment(event.when), event.more)
        for event in shown
    ]
    return table(caption, ("event", "step", "time", "more"), rows, words=("time", "more"), as_cards=True)


def moment(when: float | None) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    if when is None or not 0 <= when < _LATEST:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))


def time_of_start(start: dict[str, Any]) -> float | None:
    """When a start of run.json began."""
    try:
        return datetime.strptime(str(start.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return None


def _starts(run: ReportedRun) -> Iterator[_Event]:
    for number, start in enumerate(run.starts, start=1):
        job = f"job {start['job']}" if start.get("job") else ""
        more = on_one_line(", ".join(filter(None, (_where(start), job))), most=_MOST_CHARACTERS)
        yield _Event(f"start {number}", None, time_of_start(start), more, is_rare=True)
    begun = {str(start.get("run_id")) for start in run.starts}
    if len(run.attempts) <= len(begun):
        return
    for attempt in run.attempts:
        step, when = attempt.get("step"), attempt.get("time")
        job = on_one_line(f"job {attempt.get('job', '')}", most=_MOST_CHARACTERS)
        if when is not None and is_number(when):
            at = step if type(step) is int else None
            yield _Event("attempt by SLURM", at, float(when), job, is_rare=True)


def _where(start: dict[str, Any]) -> str:
    """The ranks and nodes of a start."""
    hosts = start.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        return str(start.get("host", ""))
    nodes = list(dict.fromkeys(map(str, hosts)))
    ranks = amount(len(hosts), "rank")
    return (
        f"{ranks} on {nodes[0]}" if len(nodes) == 1 else f"{ranks} on {len(nodes)} nodes: {', '.join(nodes)}"
    )


def _steps(run: ReportedRun) -> Iterator[_Event]:
    last = _last_checkpoint(run)
    for record in run.logged.of_kind("checkpoint"):
        step, took = record["step"], record.get("speed/checkpoint_seconds")
        more = f"held training up for {seconds(float(took))}" if took is not None and is_number(took) else ""
        yield _Event("checkpoint", step, last.get(step), more)
    for step in dict.fromkeys(record["step"] for record in run.logged.of_kind("evaluation")):
        yield _Event("evaluation", step, _written(run, step), _scores(run, step))
    if run.folder is not None:
        for pattern, what in _LEFT_BY_FAILURES.items():
            for file in sorted(run.folder.logs.glob(pattern))[:5]:
                yield _Event(
                    what, _step_in(file), None, f"logs/{on_one_line(file.name, most=80)}", is_rare=True
                )


def _scores(run: ReportedRun, step: int) -> str:
    tasks = run.compared.final.tasks
    curves = {name: dict(curve) for name, curve in run.compared.curves.items()}
    known = [(name, curve[step]) for name, curve in curves.items() if step in curve and name in tasks]
    return ", ".join(f"{name} {figure_of(tasks[name], score)}" for name, score in known)


def _step_in(file: Path) -> int | None:
    digits = file.name.partition("-step-")[2].partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else None


def _last_checkpoint(run: ReportedRun) -> dict[int, float]:
    """The newest checkpoint's step and time."""
    if run.folder is None:
        return {}
    try:
        record = read_object(run.folder.last_checkpoint_file, strict=False)
    except JsonError:
        return {}
    step, when = record.get("step"), record.get("time")
    return {step: float(when)} if type(step) is int and when is not None and is_number(when) else {}


def _written(run: ReportedRun, step: int) -> float | None:
    """When the result file of a step was written, where that lies within the run: a copied file has another time."""
    times = [when for start in run.starts if (when := time_of_start(start)) is not None]
    end = run.state.get("time")
    if run.folder is None or not times or end is None:
        return None
    try:
        written = run.folder.evaluation_file(step).stat().st_mtime
    except (OSError, OverflowError):
        return None
    return written if min(times) <= written <= end + 1 else None


def _end(run: ReportedRun) -> Iterator[_Event]:
    state = run.state.get("state")
    if state is not None:
        node = run.state.get("failed_host")
        rank = run.state.get("failed_rank")
        where = [f"rank {rank}" if rank is not None else "", f"on {node}" if node else ""]
        reason = on_one_line(run.state.get("reason", ""), most=_MOST_CHARACTERS)
        more = ", ".join(filter(None, [" ".join(filter(None, where)), reason]))
        yield _Event(_STATES[state], run.state.get("step"), run.state.get("time"), more, is_rare=True)


def _ordered(found: Sequence[_Event]) -> list[_Event]:
    """By steps; what has none stands before the first event that is known to be later, else at the beginning."""
    ordered = sorted((event for event in found if event.step is not None), key=lambda event: event.step or 0)
    without = [event for event in found if event.step is None]
    for event in reversed(without):
        later = (
            number
            for number, other in enumerate(ordered)
            if event.when is not None and other.when is not None and other.when > event.when
        )
        known = any(other.when is not None and other.step is not None for other in ordered)
        at = next(later, len(ordered)) if known and event.when is not None and event is not without[0] else 0
        ordered.insert(at, event)
    return ordered


def _thinned(found: Sequence[_Event]) -> list[_Event]:
    common = [number for number, event in enumerate(found) if not event.is_rare]
    if len(common) <= _MOST_EVENTS:
        return list(found)
    every = -(-len(common) // _MOST_EVENTS)
    kept = {*common[::every], common[-1]}
    return [event for number, event in enumerate(found) if event.is_rare or number in kept]
