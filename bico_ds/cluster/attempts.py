"""Starts of one run under a batch system: what each found and left, and whether another is worth it. Imports no torch.

What srun returns does not show how a run ended (ranks that exit 85 made it return 85 once and 143 once), so the state file
decides. attempts.jsonl has one line per start, written when it begins: the next start sees it even where a node died.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.checkpoint import manifest
from bico_ds.common.errors import RunError
from bico_ds.common.json_files import JsonError, append_object, read_object_lines
from bico_ds.common.printable import on_one_line
from bico_ds.runtime.run_folder import RunFolder, read_state

STARTS_WITHOUT_PROGRESS = 3  # that one job may make in a row; then it is not started again
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
RESTARTS_USED_UP = 76
STOPPED = 77
_REASON = 1000  # characters of a reason, in the batch script's output


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
    """All starts by a batch system so far, oldest first; none where there is no such file.

    Lines that are no starts (cut by a crash, damaged) are left out. Raises `JsonError` where the file cannot be read.
    """
    return [line for line in read_object_lines(attempts_file(run)) if _is_start(line)]


def _is_start(line: dict[str, Any]) -> bool:
    run_id = line.get("run_id")
    is_known = run_id is None or isinstance(run_id, str)
    return type(line.get("step")) is int and isinstance(line.get("job"), str) and is_known


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint that has a manifest, 0 where there is none."""
    sealed = manifest.sealed_in(RunFolder(run).checkpoints)
    return manifest.step_of(sealed[-1]) if sealed else 0


def begin(run: Path, *, job: str, restarts: int, limit: int) -> Verdict:
    """Record a start, or refuse it: exit code 1.

    Refused are a start after more than `limit` restarts, one after `STARTS_WITHOUT_PROGRESS` starts of this job at the same
    step, and a restart while there is a stop file. The first start of a submission removes the stop file. Raises
    `RunError` where that, or the file of the starts, cannot be read or written.
    """
    try:
        return _begin(run, job=job, restarts=restarts, limit=limit)
    except JsonError as error:
        raise RunError(f"{error}; move it away, then submit again") from None
    except OSError as error:
        raise RunError(f"'{error.filename}': {error.strerror}; put that right, then submit again") from None


def _begin(run: Path, *, job: str, restarts: int, limit: int) -> Verdict:
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
    append_object(attempts_file(run), line)
    return Verdict(0, f"start {restarts + 1}, from step {step}")


def end(run: Path, *, srun_code: int, stopped: bool, restarts: int, limit: int) -> Verdict:
    """How the start that `begin` recorded last has ended; `stopped`: the batch script was asked to stop."""
    try:
        attempts = read_attempts(run)
    except JsonError as error:
        return Verdict(failure(srun_code), f"{error}: not requeued")
    if not attempts:
        return Verdict(failure(srun_code), f"no start is recorded in '{attempts_file(run)}': not requeued")
    before = attempts[-1]
    state = read_state(RunFolder(run).state_file) or {}
    step = newest_step(run)
    name, what = _ending(run, state, before["run_id"], stopped=stopped, srun_code=srun_code)
    if name == "done":
        return Verdict(0, f"done after step {state.get('step', step)}")
    if name != "preempted" and step <= before["step"]:
        return Verdict(
            failure(srun_code), f"{what}, no new checkpoint since step {before['step']}: not requeued"
        )
    if stop_file(run).exists():
        return Verdict(STOPPED, f"{what}; step {step} is saved, and '{stop_file(run)}' asks to stop here")
    if restarts >= limit:
        return Verdict(
            RESTARTS_USED_UP, f"{what} at step {step}; restarted {restarts} times, no more are allowed"
        )
    return Verdict(TRY_AGAIN, f"{what}; step {step} is saved, {limit - restarts} restarts are left")


def _ending(
    run: Path, state: dict[str, Any], run_id: str | None, *, stopped: bool, srun_code: int
) -> tuple[str, str]:
    """The state in which a start has ended, and in words; `run_id` is what the state file named before it."""
    if "state" in state and state.get("run_id") != run_id:
        reason = on_one_line(state.get("reason", ""), most=_REASON)
        return state["state"], f"{state['state']} ({reason})" if reason else state["state"]
    # What srun returned is no proof of an end in good order.
    name = "preempted" if stopped else "failed"
    file = RunFolder(run).state_file
    if "state" not in state and os.path.lexists(file):
        return (
            name,
            f"{'stopped' if stopped else 'failed'}, and '{file}' is broken (srun returned {srun_code})",
        )
    # The file is an earlier start's: this one ended before it wrote a state.
    return name, f"{'stopped' if stopped else 'failed'} before training began (srun returned {srun_code})"


def failure(srun_code: int) -> int:
    """srun's exit code, or 1 where that could be taken for success or for a verdict of this module."""
    return srun_code if srun_code not in (0, TRY_AGAIN) else 1
