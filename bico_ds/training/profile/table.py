"""Where the profiled steps went: by objective the seconds of each part of a step, over all ranks. No torch here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.common.numbered_names import NumberedName
from bico_ds.planner.report.step_parts import StepPart

FOLDER = "profile"
"""In the run folder; in it a folder for each profile, named by its first step."""
STEP_FOLDER = NumberedName("step-", digits=6)
TABLE, MARKDOWN = "table.json", "table.md"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """One step on one rank: `seconds` that the loop measured, and those of each part; `ordinary`: as in `StepTable`."""

    objective: str
    step: int
    seconds: float
    ordinary: float | None
    parts: dict[StepPart, float]


class PartSeconds(NamedTuple):
    """Seconds in a step: the mean over ranks, and those of the rank on which the part took the longest."""

    mean: float
    slowest: float
    slowest_rank: int


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """The profiled `steps` of an objective, as means over them; they count from 1.

    `seconds`: of such a step while it was recorded, mean over ranks; recording takes time, most of all of short operations.
    `ordinary`: the median of the objective's steps that were not recorded, in this start and before the profile's end;
    None: there was none. `parts`: those that took any time, as `StepPart` orders them; they sum to `seconds`.
    """

    objective: str
    steps: tuple[int, ...]
    seconds: float
    ordinary: float | None
    parts: dict[StepPart, PartSeconds]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The steps of a profile by objective; `device`: cpu or cuda."""

    device: str
    ranks: int
    tables: tuple[StepTable, ...]


def profile_of(steps: Sequence[Sequence[RankStep]], *, device: str) -> Profile:
    """The profile of `steps`, each with what every rank found, in the order of the ranks."""
    by_objective: dict[str, list[Sequence[RankStep]]] = {}
    for of_ranks in steps:
        by_objective.setdefault(of_ranks[0].objective, []).append(of_ranks)
    tables = tuple(_table(*entry) for entry in by_objective.items())
    return Profile(device=device, ranks=len(steps[0]), tables=tables)


def _table(objective: str, steps: Sequence[Sequence[RankStep]]) -> StepTable:
    ordinary = [rank.ordinary for rank in steps[-1] if rank.ordinary is not None]
    return StepTable(
        objective=objective,
        steps=tuple(of_ranks[0].step for of_ranks in steps),
        seconds=statistics.fmean(rank.seconds for of_ranks in steps for rank in of_ranks),
        ordinary=statistics.fmean(ordinary) if ordinary else None,
        parts={part: found for part in StepPart if (found := _part_seconds(part, steps)).slowest > 0},
    )


def _part_seconds(part: StepPart, steps: Sequence[Sequence[RankStep]]) -> PartSeconds:
    by_rank = [
        statistics.fmean(rank.parts.get(part, 0.0) for rank in of_rank)
        for of_rank in zip(*steps, strict=True)
    ]
    slowest = max(range(len(by_rank)), key=by_rank.__getitem__)
    return PartSeconds(statistics.fmean(by_rank), by_rank[slowest], slowest)


def as_json(profile: Profile) -> str:
    tables = [
        {**asdict(table), "parts": {part.value: found._asdict() for part, found in table.parts.items()}}
        for table in profile.tables
    ]
    content = {"format": _FORMAT, "device": profile.device, "ranks": profile.ranks, "objectives": tables}
    return json.dumps(content, indent=1) + "\n"


def read_profile(run_folder: Path, step: int | None = None) -> Profile:
    """The profile that begins at `step`, or the latest one, of a run. Raises `UserError` where there is none to read."""
    found = {of: path for of, path in STEP_FOLDER.in_folder(run_folder / FOLDER) if (path / TABLE).exists()}
    if not found or (step is not None and step not in found):
        which = "profile" if step is None else f"profile from step {step}"
        raise UserError(f"'{run_folder}' has no {which}; train with --profile STEP makes one")
    file = found[max(found) if step is None else step] / TABLE
    try:
        return _read(read_object(file))
    except JsonError as error:
        raise UserError(f"{error}; profile the run again") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{file}: not the table of a profile as this version writes it; profile the run again"
        ) from None


def _read(content: dict[str, Any]) -> Profile:
    if content["format"] != _FORMAT:
        raise ValueError(content["format"])
    tables = tuple(
        StepTable(
            objective=str(table["objective"]),
            steps=tuple(map(int, table["steps"])),
            seconds=float(table["seconds"]),
            ordinary=None if table["ordinary"] is None else float(table["ordinary"]),
            parts={StepPart(name): PartSeconds(**found) for name, found in table["parts"].items()},
        )
        for table in content["objectives"]
    )
    return Profile(device=str(content["device"]), ranks=int(content["ranks"]), tables=tables)


def as_markdown(profile: Profile) -> str:
    """For a terminal, too: a table by objective, in at most 80 columns."""
    return "\n".join(line for table in profile.tables for line in _markdown(table, profile.ranks))


def _markdown(table: StepTable, ranks: int) -> list[str]:
    of = "step" if len(table.steps) == 1 else "steps"
    ordinary = "not known (no such step before it)" if table.ordinary is None else _seconds(table.ordinary)
    names = " ".join(map(str, table.steps))
    rows = [
        (
            part.value,
            f"{found.mean / table.seconds:.1%}",
            _seconds(found.mean),
            f"{_seconds(found.slowest)} (rank {found.slowest_rank})",
        )
        for part, found in table.parts.items()
    ]
    total = sum(found.mean for found in table.parts.values())
    rows.append(("sum", f"{total / table.seconds:.1%}", _seconds(total), ""))
    head = ("part", "share", "seconds", "slowest rank")
    kept = 4 if ranks > 1 else 3
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(kept)]
    lines = [_row(row, widths) for row in (head, *rows)]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return [
        f"{table.objective}, {of} {names}: profiled step {_seconds(table.seconds)}, ordinary {ordinary}",
        "",
        lines[0],
        rule,
        *lines[1:],
        "",
    ]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=False)),
    ]
    return f"| {' | '.join(padded)} |"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
