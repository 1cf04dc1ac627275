"""Starts of one run under a batch system: what each found and left, and whether another is worth it. No torch
here.

What srun returns does not tell how a run ended (ranks that exit 85 made it return 85 once and 143 once), so the
state file decides. A line of attempts.jsonl for each start, so that a start that a dead node cut off is seen
by the next one.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.runtime.run_folder import RunFolder, read_state

IN_VAIN = 3  # starts of one job, one after another, that may leave the run where they found it
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
    """Where it is, the job is not requeued: somebody wants the run saved, and stopped for good."""
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
    """Record a start. Refuses where `limit` is passed, where the last `IN_VAIN` starts of this job came no
    further, and a restart where there is a stop file; a new submission takes that away.
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
    if len(earlier) >= IN_VAIN and set(earlier[-IN_VAIN:]) == {step}:
        return Verdict(
            1, f"{IN_VAIN} starts in a row ended at step {step}; read the logs, then submit it again"
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


def end(run: Path, *, srun_code: int, stopped: bool, restarts: int, limit: int) -> Verdict:
    """Judge the start that `begin` recorded last; `stopped`: the batch script was asked to stop."""
    before = read_attempts(run)[-1]
    state = read_state(RunFolder(run).state_file) or {}
    step = newest_step(run)
    if state.get("run_id") != before["run_id"]:
        name, reason = str(state["state"]), str(state["reason"])
        what = f"{name} ({reason})" if reason else name
    else:  # the state of an earlier start: this one never came so far
        name = "preempted" if stopped else "failed"
        what = f"{'stopped' if stopped else 'failed'} before training began (srun returned {srun_code})"
    if name == "done":
        return Verdict(0, f"done after step {state['step']}")
    if name != "preempted" and step <= before["step"]:
        return Verdict(
            failure(srun_code), f"{what}, no new checkpoint since step {before['step']}: not requeued"
        )
    if stop_file(run).exists():
        return Verdict(STOPPED, f"{what}; step {step} is saved, and '{stop_file(run)}' says to stop here")
    if restarts >= limit:
        return Verdict(
            RESTARTS_USED_UP, f"{what} at step {step}; restarted {restarts} times, no more are allowed"
        )
    return Verdict(TRY_AGAIN, f"{what}; step {step} is saved, {limit - restarts} restarts are left")


def failure(srun_code: int) -> int:
    """An exit code that says failure, and is not taken for a verdict."""
    return srun_code if srun_code not in (0, TRY_AGAIN) else 1
