"""The proof: one part after the other, each with its limit; what was found is on the disk after each."""

from __future__ import annotations

import errno
import fcntl
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from bico_ds.common.errors import RunError, UserError
from bico_ds.proof import report, results
from bico_ds.proof.machine import checkout, describe_machine
from bico_ds.proof.parts import PARTS, REHEARSAL_SECONDS, Part
from bico_ds.proof.processes import Ended, run_with_limit
from bico_ds.proof.results import Result
from bico_ds.runtime.launch_environment import without_launcher

_LEAST_SECONDS = 5.0  # no part begins with less time left
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # such an error names no file
_DISTORTING = ("DS_ACCELERATOR", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    parts: Sequence[str]
    out: Path
    minutes: float
    rehearse: bool
    again: bool


@dataclass(frozen=True, kw_only=True)
class _Proof:
    """A proof under way. `bench`: the folder of the measuring tools."""

    request: Request
    bench: Path
    machine: dict[str, Any]

    @property
    def kept(self) -> Path:
        return self.request.out / "parts"

    def run(self, part: Part, seconds: float) -> Result:
        """Run one part, and keep its result; also when the user stops it."""
        out = self.request.out.resolve()
        log = out / f"{part.name}.log"
        keep = partial(self._keep, part.name, log, time.strftime("%Y-%m-%d %H:%M"))
        started = time.monotonic()
        try:
            command = part.command(self.bench, out, rehearse=self.request.rehearse)
            ended = run_with_limit(
                command,
                log=log,
                seconds=seconds,
                environment=part_environment(rehearse=self.request.rehearse),
            )
        except KeyboardInterrupt:
            keep(Ended(code=None, seconds=time.monotonic() - started), interrupted=True)
            self.write_report()
            raise
        return keep(ended)

    def _keep(self, name: str, log: Path, date: str, ended: Ended, *, interrupted: bool = False) -> Result:
        result = results.judge(name, ended, log, date=date, interrupted=interrupted)
        results.save(result, self.machine, self.kept)
        return result

    def write_report(self) -> None:
        """Write the report of all results that belong to this machine and source."""
        found = [results.load(name, self.machine, self.kept) for name in PARTS]
        report.write([result for result in found if result is not None], self.machine, self.request.out)


def prove(request: Request) -> bool:
    """Run the parts that are not done yet; True where all of them are right.

    Raises `UserError` where there is no CUDA device (but for a rehearsal), no checkout, `out` cannot be written or is
    another proof's at the moment, or a rehearsal would replace what a GPU gave; `RunError` where a file in it cannot be
    written.
    """
    deadline = time.monotonic() + 60 * request.minutes
    bench = checkout() / "tools" / "bench"
    proof = _Proof(request=request, bench=bench, machine=describe_machine(rehearse=request.rehearse))
    try:
        proof.kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to '{request.out}': {error.strerror}") from None
    try:
        with _alone(proof):
            _say_what_is_replaced(proof)
            count = f"{len(set(request.parts))} part{'s' * (len(set(request.parts)) > 1)}"
            _say(f"{report.title(proof.machine)}: {count} within {request.minutes:g} minutes")
            with _stopped_by_signals():
                ended = list(_run_parts(proof, deadline))
            proof.write_report()
    except OSError as error:
        in_out = bool(error.filename) and request.out.resolve() in Path(error.filename).resolve().parents
        if not in_out and error.errno not in _NO_ROOM:
            raise
        raise RunError(f"--out: cannot write '{error.filename or request.out}': {error.strerror}") from None
    _say_end(request, ended)
    return all(result.good for result in ended)


def _run_parts(proof: _Proof, deadline: float) -> Iterator[Result]:
    none_ran = True
    for name in dict.fromkeys(proof.request.parts):
        part, left = PARTS[name], deadline - time.monotonic()
        done = None if proof.request.again else results.load(name, proof.machine, proof.kept)
        if done is not None and done.good:
            _say(f"{name}: {done.status}, done before ({done.date})")
            yield done
            continue
        needs = max(_LEAST_SECONDS, 0.0 if none_ran or proof.request.rehearse else part.needs)
        if left < needs:
            _say(f"{name}: no time left (it needs {needs:.0f} s): a next call runs it")
            yield Result(part=name, status="no time")
            continue
        seconds = min(left, REHEARSAL_SECONDS if proof.request.rehearse else part.seconds)
        _say(f"{name}: {part.question} (at most {seconds:.0f} s)")
        none_ran = False
        result = proof.run(part, seconds)
        proof.write_report()
        _say(
            f"{name}: {result.status} after {result.seconds:.0f} s{': ' * bool(result.problem)}{result.problem}"
        )
        yield result


def node_problems(*, on_cuda: bool) -> list[str]:
    """What is wrong with the attention backends of this node; on a node without a GPU, with those of its CPU.

    For the pre-flight. Raises `UserError` where there is no checkout.
    """
    part, bench = PARTS["check"], checkout() / "tools" / "bench"
    with TemporaryDirectory() as folder:
        log = Path(folder, "check.log")
        ended = run_with_limit(
            part.command(bench, Path(folder), rehearse=not on_cuda),
            log=log,
            seconds=part.seconds,
            environment=part_environment(rehearse=not on_cuda),
        )
        result = results.judge(part.name, ended, log, date="")
    return [] if result.good else [f"the check of the attention backends: {result.status}: {result.problem}"]


def part_environment(*, rehearse: bool) -> dict[str, str]:
    """A part is a process by itself, without network; a rehearsal sees no GPU.

    What the user may have set to work without a GPU, or to find a mistake, would give a CPU's figures for those of a GPU, or
    those of a GPU that waits after each kernel.
    """
    kept = {name: value for name, value in without_launcher().items() if name not in _DISTORTING}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else {}
    return {**kept, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **hidden}


@contextmanager
def _alone(proof: _Proof) -> Iterator[None]:
    """Raises `UserError` where another proof writes to the same folder: their logs would mix, and each slows the other."""
    with open(proof.kept / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another proof is at work in '{proof.request.out}'") from None
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within this block SIGTERM, and SIGHUP where it is not ignored (`nohup`), end the command as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [
        signal.SIGTERM,
        *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []),
    ]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_what_is_replaced(proof: _Proof) -> None:
    """Raises `UserError` where a rehearsal would replace what a GPU gave."""
    others = results.other_machines(proof.machine, proof.kept)
    for other in others:
        if proof.request.rehearse and not other.get("rehearsal"):
            raise UserError(
                f"--out: '{proof.request.out}' holds results of {other.get('gpu')}, which a rehearsal would replace: take "
                "another folder"
            )
    if others:
        differ = sorted(
            {key for other in others for key in proof.machine if other.get(key) != proof.machine[key]}
        )
        _say(
            f"results in {proof.request.out} differ in {', '.join(differ)}: they are not taken over, and are replaced"
        )


def _say_end(request: Request, ended: Sequence[Result]) -> None:
    page = request.out / "report.md"
    bad = [f"{result.part} ({result.status})" for result in ended if not result.good]
    _say(f"not right: {', '.join(bad)}; the same command runs these again" if bad else "all parts are right")
    target = "docs/benchmarks/gpu_rehearsal.md" if request.rehearse else "docs/benchmarks/gpu.md"
    _say(f"report: {page}; to publish it in a checkout: cp {shlex.quote(str(page))} {target}")


def _say(line: str) -> None:
    print(f"gpu-proof: {line}", flush=True)
