"""Starts of one run under a batch system: what each found and left, and whether another is worth it. Imports no torch.

What srun returns does not show how a run ended (ranks that exit 85 made it return 85 once and 143 once), so the state file
decides. attempts.jsonl has one line per start, written when it begins: the next start sees it even where a node died.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.runtime.run_folder import RunFolder, read_state

STARTS_WITHOUT_PROGRESS = 3  # that one job may make in a row; then it is not started again
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
RESTARTS_USED_UP = 76
STOPPED = 77


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next."""

    exit_code: int
    why: str


def attempts_file(run: Path) -> Path:
    return run / "slurm" / "attempts.jsonl"


def stop_file(run: Path) -> Path:
    """The file that asks a run to stop: while it exists, the run saves, ends, and is not requeued."""
    return run / "stop"


def read_attempts(run: Path) -> list[dict[str, Any]]:
    """All starts by a batch system so far, oldest first; none where there is no such file."""
    path = attempts_file(run)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a line cut by a crash is left out


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint that has a manifest, 0 where there is none."""
    manifests = RunFolder(run).checkpoints.glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=0)


def begin(run: Path, *, job: str, restarts: int, limit: int) -> Verdict:
    """Record a start, or refuse it: exit code 1.

    Refused are a start after more than `limit` restarts, one after `STARTS_WITHOUT_PROGRESS` starts of this job at the same
    step, and a restart while there is a stop file. The first start of a submission removes the stop file.
    """
    step = newest_step(run)
    if restarts == 0:
        stop_file(run).unlink(missing_ok=True)
    elif stop_file(run).exists():
        return Verdict(1, f"'{stop_file(run)}' is there; submit it again to go on from step {step}")
    earlier = [attempt["step"] for attempt in read_attempts(run) if attempt["job"] == job]
    if restarts > limit:
        return Verdict(
            1, f"restarted {restarts} times, {limit} are allowed; submit it again to go on from step {step}"
        )
    recent = earlier[-STARTS_WITHOUT_PROGRESS:]
    if len(recent) == STARTS_WITHOUT_PROGRESS and set(recent) == {step}:
        return Verdict(
            1, f"{len(recent)} starts in a row ended at step {step}; read the logs, then submit it again"
        )
    state = read_state(RunFolder(run).state_file) or {}
    line = {
        "job": job,
        "restarts": restarts,
        "step": step,
        "run_id": state.get("run_id"),
        "time": time.time(),
    }
    path = attempts_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return Verdict(0, f"start {restarts + 1}, from step {step}")


def end(
    run: Path, *, srun_code: int, stopped: bool, restarts: int, limit: int, excluded: str = ""
) -> Verdict:
    """How the start that `begin` recorded last has ended; `stopped`: the batch script was asked to stop.

    `excluded`: a node that the next start is to leave out, which makes one worth trying without a new checkpoint, too.
    """
    attempts = read_attempts(run)
    if not attempts:
        return Verdict(failure(srun_code), f"no start is recorded in '{attempts_file(run)}': not requeued")
    before = attempts[-1]
    state = read_state(RunFolder(run).state_file) or {}
    step = newest_step(run)
    if state.get("run_id") != before["run_id"]:
        name, reason = str(state["state"]), str(state["reason"])
        what = f"{name} ({reason})" if reason else name
    else:  # the file is an earlier start's: this one ended before it wrote a state
        name = "preempted" if stopped else "failed"
        what = f"{'stopped' if stopped else 'failed'} before training began (srun returned {srun_code})"
    if name == "done":
        return Verdict(0, f"done after step {state['step']}")
    if name != "preempted" and step <= before["step"] and not excluded:
        return Verdict(
            failure(srun_code), f"{what}, no new checkpoint since step {before['step']}: not requeued"
        )
    if stop_file(run).exists():
        return Verdict(STOPPED, f"{what}; step {step} is saved, and '{stop_file(run)}' asks to stop here")
    if restarts >= limit:
        return Verdict(
            RESTARTS_USED_UP, f"{what} at step {step}; restarted {restarts} times, no more are allowed"
        )
    without = f", without node {excluded}" if excluded else ""
    return Verdict(TRY_AGAIN, f"{what}; step {step} is saved, {limit - restarts} restarts are left{without}")


def failure(srun_code: int) -> int:
    """srun's exit code, or 1 where that could be taken for success or for a verdict of this module."""
    return srun_code if srun_code not in (0, TRY_AGAIN) else 1
