"""The section of speed, memory and work: what was measured, and what the planner had said."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bico_ds.common.json_files import is_number
from bico_ds.common.printable import on_one_line
from bico_ds.evaluation.report.page.chart import Chart, Curve, draw, legend
from bico_ds.evaluation.report.page.curves import thinned
from bico_ds.evaluation.report.page.html import Html, element, section, table
from bico_ds.evaluation.report.page.numbers import compact, gigabytes, in_words, percent, seconds
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.tables import WORK_COLUMNS, work_lines

_WORK, _MOST_CHARACTERS = "work/", 200
_PARTS = ("measured", "low", "high", "ratio")  # of what the planner said

_ON_CPUS = " (on a CPU: growth of the process)"  # where tensors alone are not counted


class _Quantity(NamedTuple):
    """What stands in a row: a key of metrics, how it is called, and how one figure is made of its values, and written."""

    key: str
    name: str
    written: Callable[[float], str]
    of: Callable[[Sequence[float]], float] = statistics.median


def _gb(value: float) -> str:
    return gigabytes(value * 1e9)


_QUANTITIES = (
    _Quantity("speed/represented_tokens_per_second", "tokens of the texts per second", compact),
    _Quantity("speed/represented_tokens_per_second_per_rank", "tokens of the texts per second and rank", compact),
    _Quantity("speed/kept_tokens_per_second", "tokens through the model per second", compact),
    _Quantity("speed/kept_tokens_per_second_per_rank", "tokens through the model per second and rank", compact),
    _Quantity("speed/step_seconds", "time of a step", seconds),
    _Quantity("speed/data_wait_share", "of it, waiting for data", percent),
    _Quantity("speed/monitor_share", "of the time, showing and writing", percent),
    _Quantity("speed/mfu", "MFU", percent),
    _Quantity("speed/checkpoint_seconds", "a checkpoint holds training up for", seconds),
    _Quantity("speed/evaluation_seconds", "an evaluation takes", seconds),
    _Quantity("memory/peak_gb", f"peak memory of tensors{_ON_CPUS}", _gb, max),
    _Quantity("memory/reserved_gb", f"reserved memory, at most{_ON_CPUS}", _gb, max),
    _Quantity("memory/host_gb", "memory of the process, at most", _gb, max),
)  # fmt: skip
_CHARTS = {
    "speed/represented_tokens_per_second": "Tokens of the texts per second",
    "speed/step_seconds": "Seconds of a step",
    "memory/allocated_gb": f"Memory of tensors{_ON_CPUS}, GB",
}


def speed(runs: Sequence[ReportedRun]) -> Html | None:
    """Speed and memory, measured and planned, and the work done; None where nothing of it is known."""
    measured = [row for quantity in _rows(runs) if (row := _row(runs, quantity)) is not None]
    planned = [row for run in runs for row in _planned(run)]
    work = {run.label: run.work for run in runs}
    if not measured and not planned and not any(work.values()):
        return None
    labels = [run.label for run in runs]
    return section(
        "speed",
        "Speed, memory and work",
        *_machines(runs),
        *_figures(runs),
        table("Measured: medians over the logged lines", ("", *labels), measured) if measured else None,
        table(
            "Planned beside measured, in the last start of each run",
            ("run", "what", "measured", "planned", "measured / middle of the plan"),
            planned,
            words=("what",),
            as_cards=True,
        )
        if planned
        else None,
        table(
            "Work done. FLOPs: useful ones, as MFU counts them", WORK_COLUMNS, work_lines(work), as_cards=True
        )
        if any(work.values())
        else None,
        _by_objective(runs),
    )


def _figures(runs: Sequence[ReportedRun]) -> Iterator[Html]:
    if figures := list(_charts(runs)):
        yield legend([run.label if run.logged.series else "" for run in runs])
        yield element("div", *figures, class_="panels")


def _rows(runs: Sequence[ReportedRun]) -> list[_Quantity]:
    """The quantities, with the MFU of each objective after that of all."""
    keys = sorted({key for run in runs for key in run.logged.series if key.startswith("speed/mfu/")})
    mfus = [_Quantity(key, f"MFU of {key.removeprefix('speed/mfu/')}", percent) for key in keys]
    at = next(number for number, x in enumerate(_QUANTITIES) if x.key == "speed/mfu") + 1
    return [*_QUANTITIES[:at], *mfus, *_QUANTITIES[at:]]


def _row(runs: Sequence[ReportedRun], quantity: _Quantity) -> list[str] | None:
    values = [_values(run, quantity.key) for run in runs]
    if not any(values):
        return None
    return [quantity.name, *(quantity.written(quantity.of(x)) if x else "–" for x in values)]


def _values(run: ReportedRun, key: str) -> list[float]:
    if (series := run.logged.series.get(key)) is not None:
        return list(series.values)
    return [record[key] for _, record in run.logged.other if is_number(record.get(key))]


def _charts(runs: Sequence[ReportedRun]) -> Iterator[Html]:
    for number, (key, title) in enumerate(_CHARTS.items()):
        known = [
            (index, run, run.logged.series[key]) for index, run in enumerate(runs) if key in run.logged.series
        ]
        if known:
            curves = [Curve(index, run.label, thinned(series)[0]) for index, run, series in known]
            medians = [statistics.median(y for _, y in curve.points) for curve in curves]
            chart = Chart(
                identifier=f"speed-{number}",
                title=f"{title}, over the steps",
                summary=" ".join(
                    f"{curve.label}: median {compact(median)}."
                    for curve, median in zip(curves, medians, strict=True)
                ),
                x_name="optimizer step",
                curves=curves,
                from_zero=True,
            )
            yield element("figure", element("h3", title), draw(chart))


def _plan(run: ReportedRun) -> dict[str, Any]:
    plan = run.starts[-1].get("plan") if run.starts else None
    return plan if isinstance(plan, dict) else {}


def _machines(runs: Sequence[ReportedRun]) -> Iterator[Html]:
    """On what the runs ran, those on the same in one sentence."""
    found: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        device, peak = _plan(run).get("device"), _plan(run).get("peak_flops")
        if isinstance(device, str):
            of = f"; MFU is of {compact(float(peak))}FLOP/s" if peak is not None and is_number(peak) else ""
            how = ", a matrix product's speed measured there" if of and device.startswith("a CPU") else ""
            found[f"{on_one_line(device, most=_MOST_CHARACTERS)}{of}{how}"].append(run.label)
    for machine, labels in found.items():
        yield element("p", f"{in_words(labels)} ran on {machine}.", class_="soft")


def _planned(run: ReportedRun) -> Iterator[list[str]]:
    plan = _plan(run)
    memory = "growth of the process" if str(plan.get("device")).startswith("a CPU") else "memory"
    for key in (key.removesuffix("/measured") for key in plan if key.endswith("/measured")):
        numbers = [
            x for x in (plan.get(f"{key}/{part}") for part in _PARTS) if x is not None and is_number(x)
        ]
        if len(numbers) < len(_PARTS):
            continue
        measured, low, high, ratio = numbers
        written = gigabytes if key.startswith("memory") else seconds
        what, _, of = key.partition("/")
        name = {"step_seconds": f"step of {of}", "memory_bytes": memory}.get(what, key)
        same = written(low) == written(high)
        yield [
            run.label,
            name,
            written(measured),
            written(low) if same else f"{written(low)} to {written(high)}",
            f"{ratio:.2g} times",
        ]


def _by_objective(runs: Sequence[ReportedRun]) -> Html | None:
    """What each objective did of the work, by the last line of a run that says it."""
    rows = [row for run in runs for row in _objectives(run)]
    if not rows:
        return None
    headers = ("run", "objective", "steps", "tokens of the texts", "FLOPs", "share of FLOPs")
    return table("The work by objective", headers, rows, words=("objective",), as_cards=True)


def _objectives(run: ReportedRun) -> Iterator[list[str]]:
    done: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in run.logged.last.items():
        if key.startswith(_WORK) and key.count("/") == 2 and is_number(value):
            _, what, objective = key.split("/")
            done[objective][what] = value
    flops = sum(numbers.get("flops", 0.0) for numbers in done.values())
    for objective, numbers in done.items():
        own = numbers.get("flops")
        yield [
            run.label,
            objective,
            *(f"{numbers[what]:,.0f}" if what in numbers else "–" for what in ("steps", "tokens")),
            "–" if own is None else f"{own:.3g}",
            "–" if own is None or not flops else percent(own / flops),
        ]
