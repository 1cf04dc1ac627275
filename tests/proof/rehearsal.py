"""The GPU proof, rehearsed on a CPU: once per session, for the tests of every tool that it runs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from bico_ds.proof.findings import Findings
from tests import ROOT
from tests.distributed.launching import environment


def reads_rehearsal(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that takes the fixture `rehearsal`, which the first one of a session waits for."""
    return pytest.mark.distributed(pytest.mark.timeout(1300)(test))


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The results in `folder`, and how the command ended."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    def log(self, part: str) -> str:
        return (self.folder / f"{part}.log").read_text()

    def findings(self, part: str) -> dict[str, Any]:
        """What a part's tool printed at last, which keeps the contract."""
        lines = [line for line in self.log(part).splitlines() if line.startswith('{"rows": ')]
        assert lines, self.log(part)
        return checked(lines[-1])


def rehearse_once(shared: Path) -> Rehearsal:
    """The rehearsal in `shared`, a folder of all workers of a session: the first of them makes it, the others wait."""
    with open(shared / "rehearsal.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, ended = shared / "proof", shared / "rehearsal-ended.json"
        if not ended.exists():
            folder.mkdir()
            done = rehearse(folder).done
            ended.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
        code, out, errors = json.loads(ended.read_text(encoding="utf-8"))
    done = subprocess.CompletedProcess([], code, out, errors)
    return Rehearsal(folder=folder / "out", done=done)


def rehearse(folder: Path) -> Rehearsal:
    """Away from its checkout, as a user may start it, and without a GPU, as the rehearsal promises."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_proof.py"),
        "--rehearse",
        "--minutes",
        "20",
        "--out",
        "out",
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment() | {"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    return Rehearsal(folder=folder / "out", done=done)


def checked(line: str) -> dict[str, Any]:
    """The findings in a tool's last line: complete, tables rectangular, every ratio above 1 where ours is better."""
    found = json.loads(line)
    assert set(found) == {field.name for field in fields(Findings)}
    for row in found["rows"]:
        assert set(row) == {"name", "ours", "other", "unit", "ratio"}
        shorter_is_better = {"ms": True, "tokens/s": False}[row["unit"]]
        ours, other = row["ours"], row["other"]
        assert row["ratio"] == pytest.approx(other / ours if shorter_is_better else ours / other, rel=1e-4), (
            row
        )
    for table in found["tables"]:
        assert set(table) == {"title", "columns", "rows"}
        assert {len(cells) for cells in table["rows"]} == {len(table["columns"])}
    return found
