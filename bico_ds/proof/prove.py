"""The proof: one part after the other, each with its limit; what was found is on the disk after each."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.proof import report, results
from bico_ds.proof.machine import checkout, describe_machine
from bico_ds.proof.parts import PARTS, REHEARSAL_SECONDS, Part
from bico_ds.proof.processes import Ended, run_with_limit
from bico_ds.proof.results import Result
from bico_ds.runtime.launch_environment import without_launcher

_LEAST_SECONDS = 5.0  # no part begins with less time left


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
        out, date = self.request.out.resolve(), time.strftime("%Y-%m-%d %H:%M")
        log = out / f"{part.name}.log"
        started, interrupted = time.monotonic(), True
        ended = Ended(code=None, seconds=0.0)
        try:
            command = part.command(self.bench, out, rehearse=self.request.rehearse)
            ended = run_with_limit(
                command,
                log=log,
                seconds=seconds,
                environment=part_environment(rehearse=self.request.rehearse),
            )
            interrupted = False
        finally:
            if interrupted:
                ended = Ended(code=None, seconds=time.monotonic() - started)
            result = results.judge(part.name, ended, log, date=date, interrupted=interrupted)
            results.save(result, self.machine, self.kept)
            if interrupted:
                self.write_report()
        return result

    def write_report(self) -> None:
        """Write the report of all results that belong to this machine and source."""
        found = [results.load(name, self.machine, self.kept) for name in PARTS]
        report.write([result for result in found if result is not None], self.machine, self.request.out)


def prove(request: Request) -> bool:
    """Run the parts that are not done yet; True where all of them are right.

    Raises `UserError` where there is no CUDA device (but for a rehearsal), no checkout, or `out` cannot be written.
    """
    deadline = time.monotonic() + 60 * request.minutes
    bench = checkout() / "tools" / "bench"
    proof = _Proof(request=request, bench=bench, machine=describe_machine(rehearse=request.rehearse))
    try:
        proof.kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to '{request.out}': {error.strerror}") from None
    _say(f"{report.title(proof.machine)}: {len(request.parts)} parts within {request.minutes:g} minutes")
    with _stopped_by_sigterm():
        ended = list(_run_parts(proof, deadline))
    proof.write_report()
    _say_end(request, ended)
    return all(result.good for result in ended)


def _run_parts(proof: _Proof, deadline: float) -> Iterator[Result]:
    for name in proof.request.parts:
        part, left = PARTS[name], deadline - time.monotonic()
        done = None if proof.request.again else results.load(name, proof.machine, proof.kept)
        if done is not None and done.good:
            _say(f"{name}: {done.status}, done before ({done.date})")
            yield done
            continue
        if left < _LEAST_SECONDS:
            _say(f"{name}: no time left; the next call begins here")
            yield Result(part=name, status="no time")
            continue
        seconds = min(left, REHEARSAL_SECONDS if proof.request.rehearse else part.seconds)
        _say(f"{name}: {part.question} (at most {seconds:.0f} s)")
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
    """A part is a process by itself, without network; a rehearsal sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else {}
    return {**without_launcher(), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **hidden}


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Within this block SIGTERM ends the command as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_end(request: Request, ended: Sequence[Result]) -> None:
    page = request.out / "report.md"
    bad = [f"{result.part} ({result.status})" for result in ended if not result.good]
    _say(f"not right: {', '.join(bad)}; the same command runs these again" if bad else "all parts are right")
    target = "docs/benchmarks/gpu_rehearsal.md" if request.rehearse else "docs/benchmarks/gpu.md"
    _say(f"report: {page}; to publish it in a checkout: cp {page} {target}")


def _say(line: str) -> None:
    print(f"gpu-proof: {line}", flush=True)
