"""The result of a part: kept in a file of its own, so that a later call goes on from there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bico_ds.common.files import write_atomically
from bico_ds.proof.findings import Findings, read_findings, read_steps
from bico_ds.proof.processes import Ended

Status = Literal["right", "not measured", "wrong", "failed", "cut", "interrupted", "no time"]
GOOD: tuple[Status, ...] = ("right", "not measured")
SHOWN_LINES = 25  # of the output of a part that came to no end


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a part ended, and what it found.

    `status`: right; not measured (this machine lacks what it takes); wrong (measured, and not as it must be); failed (no
    findings); cut (by its limit, or it left out what it had no time for); interrupted (by the user); no time (not begun).
    `problem`: one line, empty where the status is right. `output`: the last lines of one that came to no end.
    """

    part: str
    status: Status
    seconds: float = 0.0
    problem: str = ""
    date: str = ""
    findings: Findings = field(default_factory=Findings)
    output: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.status in GOOD


def judge(part: str, ended: Ended, log: Path, *, date: str, interrupted: bool = False) -> Result:
    """The result of a part whose program has ended, by its exit code and its output."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    findings = read_findings(lines)
    status, problem = _status(ended, findings, lines, interrupted)
    return Result(
        part=part,
        status=status,
        seconds=round(ended.seconds, 1),
        problem=problem,
        date=date,
        findings=findings or read_steps(lines),
        output=lines[-SHOWN_LINES:] if status in ("failed", "cut", "interrupted") else [],
    )


def _status(
    ended: Ended, findings: Findings | None, lines: list[str], interrupted: bool
) -> tuple[Status, str]:
    if interrupted:
        return "interrupted", f"stopped after {ended.seconds:.0f} s"
    if ended.code is None:
        return "cut", f"its limit was {ended.seconds:.0f} s"
    if findings is None or ended.code not in (0, 1):
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        missing = "" if ended.code else ", without findings"
        return "failed", f"exit code {ended.code}{missing}: {said[:500]}"
    if findings.wrong or ended.code:
        return "wrong", "; ".join(findings.wrong) or "exit code 1 (see the log)"
    if findings.left_out:
        return (
            "cut",
            f"no time was left for {', '.join(findings.left_out)}; what was compiled is kept for the next call",
        )
    return ("not measured", findings.not_measured) if findings.not_measured else ("right", "")


def save(result: Result, machine: dict[str, Any], folder: Path) -> None:
    """Write a result, with the machine that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "result": asdict(result)}
    write_atomically(folder / f"{result.part}.json", json.dumps(content, indent=1) + "\n")


def load(part: str, machine: dict[str, Any], folder: Path) -> Result | None:
    """The kept result of a part on this machine, source and versions; None where there is none."""
    content = _read(folder / f"{part}.json")
    if content is None or content["machine"] != machine:
        return None
    kept = content["result"]
    return Result(**{**kept, "findings": Findings(**kept["findings"])})


def other_machines(machine: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The machines, other than this one, whose results the folder holds, each once."""
    contents = (_read(file) for file in sorted(folder.glob("*.json")))
    found: list[dict[str, Any]] = []
    for content in contents:
        if content is not None and content["machine"] not in (machine, *found):
            found.append(content["machine"])
    return found


def _read(file: Path) -> dict[str, Any] | None:
    """What `save` wrote; None where the file is missing, or is damaged or another program's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        is_ours = isinstance(content["machine"], dict) and isinstance(content["result"]["findings"], dict)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if is_ours else None
