"""What the proof is to show: each aim, the figure for it among the parts' findings, and whether it is met."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bico_ds.proof.findings import Findings
from bico_ds.proof.results import Result

SHORT, LONG = 40, 2048  # tokens per document of the whole steps


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One aim. `part`: whose findings hold its figure; `figure`: finds it there, None where it was not measured."""

    text: str
    part: str
    figure: Callable[[Findings], float | None]
    most: float | None = None
    least: float | None = None
    unit: str = ""

    @property
    def limit(self) -> str:
        bound = f"≤ {self.most:g}" if self.most is not None else f"≥ {self.least:g}"
        return f"{bound} {self.unit}".strip()

    def is_met(self, figure: float) -> bool:
        return (self.most is None or figure <= self.most) and (self.least is None or figure >= self.least)


Verdict = Literal["met", "missed", "in doubt", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """An aim beside what was found; in doubt: met by a part that found something wrong."""

    aim: str
    limit: str
    figure: str
    verdict: Verdict


def _step_time(findings: Findings, *, length: int) -> float | None:
    """A BICO step's time over that of an NTP step of the same documents, each by the attention backend that is best at it.

    By one backend for both, one that is slow for NTP would make BICO look good.
    """
    steps = _steps(findings, length)
    bico, ntp = ([step["ms"] for step in steps if step["kind"] == kind] for kind in ("bico", "ntp"))
    return min(bico) / min(ntp) if bico and ntp else None


def _mfu(findings: Findings, *, kind: str) -> float | None:
    """Percent, of the step with long documents, by the attention backend that is fastest."""
    found = [step["mfu"] for step in _steps(findings, LONG) if step["kind"] == kind]
    return max((100 * mfu for mfu in found if mfu is not None), default=None)


def _steps(findings: Findings, length: int) -> list[dict[str, Any]]:
    """Of documents of `length` tokens, without the plain ones, which others are compared with."""
    return [step for step in findings.steps if step["length"] == length and not step.get("plain")]


def _memory_off(findings: Findings) -> float | None:
    """Per cent, of the step and phase whose memory is farthest from the planner's."""
    found = [step.get("memory_off") for step in findings.steps]
    return max((off for off in found if off is not None), default=None)


def _least_speed_up(findings: Findings, *, ours: str, other: str, tokens: tuple[int, ...]) -> float | None:
    """The smallest ratio of the rows that name both and one of the lengths `tokens`.

    Both are regular expressions for a row's name. None where a length was not measured: it may be the worst.
    """
    found = [
        (_length(row["name"]), row["ratio"])
        for row in findings.rows
        if re.search(ours, row["name"]) and re.search(other, row["name"]) and _length(row["name"]) in tokens
    ]
    measured = {length for length, _ in found}
    return min(factor for _, factor in found) if measured == set(tokens) else None


def _length(name: str) -> int:
    """The tokens per document that a row's name gives; 0 where it gives none."""
    found = re.search(r"\b(\d+) tokens", name)
    return int(found.group(1)) if found else 0


AIMS = (
    Aim(
        text=f"time of a BICO step, documents of {SHORT} tokens",
        part="step",
        figure=partial(_step_time, length=SHORT),
        most=0.9,
        unit="of an NTP step's",
    ),
    Aim(
        text=f"time of a BICO step, documents of {LONG} tokens",
        part="step",
        figure=partial(_step_time, length=LONG),
        most=1.05,
        unit="of an NTP step's",
    ),
    Aim(
        text=f"MFU of an NTP step at Llama-3-8B's shape, documents of {LONG} tokens",
        part="step",
        figure=partial(_mfu, kind="ntp"),
        least=50,
        unit="%",
    ),
    Aim(
        text=f"MFU of a BICO step at Llama-3-8B's shape, documents of {LONG} tokens",
        part="step",
        figure=partial(_mfu, kind="bico"),
        least=48,
        unit="%",
    ),
    Aim(
        text="memory of a step, phase by phase, beside the planner's",
        part="step",
        figure=_memory_off,
        most=10,
        unit="% off",
    ),
    Aim(
        text="bidirectional attention in one pass beside two passes, up to 512 tokens",
        part="speed",
        figure=partial(_least_speed_up, ours="^triton", other="two passes", tokens=(40, 512)),
        least=2,
        unit="times as fast",
    ),
    Aim(
        text="bidirectional attention beside the authors' dense formulation, 2048 tokens",
        part="speed",
        figure=partial(
            _least_speed_up, ours="bidirectional", other="beside the authors' dense", tokens=(2048,)
        ),
        least=5,
        unit="times as fast",
    ),
)
RIGHT = "every attention backend is right"


def judge_aims(results: Mapping[str, Result], *, rehearsal: bool) -> list[Judgement]:
    """Every aim beside the parts' results; in a rehearsal nothing is measured."""
    known = {} if rehearsal else results
    return [_judge_check(known.get("check")), *(_judge(aim, known.get(aim.part)) for aim in AIMS)]


def _judge_check(result: Result | None) -> Judgement:
    judgement = partial(Judgement, aim=RIGHT, limit="all")
    if result is not None and result.status == "wrong":
        return judgement(figure=f"wrong: {len(result.findings.wrong)}", verdict="missed")
    checked = _checked_backends(result.findings) if result is not None and result.status == "right" else []
    if not checked:
        return judgement(figure="", verdict="not measured")
    return judgement(figure=f"all that run here: {', '.join(checked)}", verdict="met")


def _checked_backends(findings: Findings) -> list[str]:
    """By the tables' columns of that name."""
    named = [
        row[table["columns"].index("backend")]
        for table in findings.tables
        if "backend" in table["columns"]
        for row in table["rows"]
    ]
    return list(dict.fromkeys(named))


def _judge(aim: Aim, result: Result | None) -> Judgement:
    figure = aim.figure(result.findings) if result is not None else None
    if result is None or figure is None:
        return Judgement(aim=aim.text, limit=aim.limit, figure="", verdict="not measured")
    verdict: Verdict = "met" if aim.is_met(figure) else "missed"
    if verdict == "met" and result.status == "wrong":
        verdict = "in doubt"
    return Judgement(aim=aim.text, limit=aim.limit, figure=f"{figure:.3g}", verdict=verdict)
