"""`make drills`: what can happen to a run, done to a run; at the end a table of what it cost.

BICO_DS_DRILL_KILLS is the number of random kills (25).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from tests.distributed.launching import (
    end_tree,
    environment,
    last_step,
    launch_command,
    metrics,
    ranks_of,
    start,
    train,
    wait_until,
)
from tests.distributed.survival import (
    EVERY,
    RECIPE,
    SMALL,
    STEPS,
    assert_same_course,
    curve,
    final_manifest,
    log,
    state,
)

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("BICO_DS_DRILL_KILLS", "25"))
KILL_STEPS = max(STEPS, 10 * KILLS)
Report = Callable[[str, str, object], None]


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """`report(drill, what happened, lost steps)` of a drill that went well; the table is printed after the last one."""
    table = Table("drill", "what happened", "lost steps", "verdict", title="drills")
    yield lambda drill, happened, lost: table.add_row(
        drill, happened, str(lost), "[green]as it should[/green]"
    )
    Console(width=140).print("\n", table)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    return complete(tmp_path_factory.mktemp("drills") / "straight")


def complete(run: Path, *overrides: str, **options: Any) -> Path:
    done = train(RECIPE, run, *SMALL, *overrides, timeout=1200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    run.with_suffix(".out").write_text(done.stdout + done.stderr)
    return run


def test_random_kills(straight, tmp_path, report):
    """kill -9 of a rank, the launcher, or the whole tree, at random moments; every third while a checkpoint is written."""
    length = f"training.steps={KILL_STEPS}"
    reference = complete(tmp_path / "reference", length)
    run, draw = tmp_path / "killed", random.Random(20231107)
    for number in range(KILLS):
        before = last_step(run)
        command = start(RECIPE, run, *SMALL, length)
        try:
            target = draw.choice(["rank 0", "rank 1", "launcher", "tree"])
            while_saving = number % 3 == 2
            goal = min(before + draw.randint(1, EVERY + 3), KILL_STEPS - 1)
            wait_until(lambda goal=goal: last_step(run) >= goal, command, timeout=900)
            if while_saving:
                wait_until(lambda: list(run.glob("checkpoints/.step-*.incomplete")), command, timeout=300)
            time.sleep(draw.random() * 0.2)
            kill(command, target)
            command.wait(timeout=200)
            wait_until_gone(run)
            reached = last_step(run)  # it went on until it was killed
        finally:
            end_tree(command)
        lost = reached - newest(run)
        report(f"kill {number + 1}", f"{target} at step {reached}{' while saving' * while_saving}", lost)
        assert 0 <= lost <= 2 * EVERY
    assert_same_course(complete(run, length), reference, KILL_STEPS)


def kill(command: subprocess.Popen[str], target: str) -> None:
    ranks = ranks_of(command)
    if target == "tree":
        end_tree(command)
    elif target == "launcher":
        ranks[0].parent().kill()
    else:
        ranks[int(target[-1])].kill()


def wait_until_gone(run: Path, timeout: float = 120) -> None:
    """Until no process works on this run folder."""
    deadline = time.monotonic() + timeout
    while any(str(run) in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "ranks were left running"
        time.sleep(0.2)


def newest(run: Path) -> int:
    return max(
        (int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/manifest.json")), default=0
    )


def test_two_ranks_one_rank_two_ranks(tmp_path, report):
    """100 steps: 40 on two ranks, 30 on one with other micro-batches, 30 on two; against 100 on two."""
    length = ("training.steps=100", "schedule.decay_steps=20")
    reference, run = complete(tmp_path / "reference", *length), tmp_path / "elastic"
    for until, ranks, micro in ((40, 2, 2), (70, 1, 1), (100, 2, 1)):
        command = start(RECIPE, run, *SMALL, *length, f"training.micro_batch_bins={micro}", ranks=ranks)
        wait_until(lambda until=until: last_step(run) >= until, command, timeout=1200)
        if until < 100:
            os.kill(ranks_of(command)[0].pid if ranks > 1 else command.pid, signal.SIGTERM)
        command.wait(timeout=300)
    ours, theirs = curve(run), curve(reference)
    assert [step for step, *_ in ours] == list(range(1, 101))
    worst = max(abs(mine[1] - other[1]) for mine, other in zip(ours, theirs, strict=True))
    assert worst < 1e-4
    assert final_manifest(run, 100)["state"]["loader"] == final_manifest(reference, 100)["state"]["loader"]
    report("elastic", f"2 -> 1 -> 2 ranks, other micro-batches, 100 steps: losses within {worst:.1e}", 0)


def test_a_rank_that_stands_still(tmp_path, report):
    run = tmp_path / "stopped"
    command = start(RECIPE, run, *SMALL, "distributed.watchdog_minutes=0.25")
    try:
        wait_until(lambda: last_step(run) >= EVERY + 1, command, timeout=600)
        ranks_of(command)[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert command.wait(timeout=200) != 0
        seconds = time.monotonic() - began
    finally:
        end_tree(command)
    stacks = (run / "logs" / "stacks-rank-0.txt").read_text()
    assert (run / "logs" / "flight_recorder" / "rank-0").stat().st_size > 0
    assert "trainer.py" in stacks
    assert "no progress for 15 seconds" in log(run)
    assert state(run)["state"] == "failed"
    report(
        "SIGSTOP of rank 1",
        f"the job ended after {seconds:.0f} s, stacks of rank 0 on file",
        last_step(run) - newest(run),
    )


@pytest.mark.parametrize("victim", ["per-node launcher", "deepspeed command"])
def test_a_launcher_that_is_killed(tmp_path, report, victim):
    run = tmp_path / "orphans"
    command = start(RECIPE, run, *SMALL)
    try:
        wait_until(lambda: last_step(run) >= EVERY + 1, command, timeout=600)
        ranks = ranks_of(command)
        (ranks[0].parent() if victim == "per-node launcher" else command).kill()
        wait_until_gone(run)
    finally:
        end_tree(command)
    if victim == "deepspeed command":
        assert state(run)["state"] == "preempted"
        assert newest(run) == last_step(run)
    report(f"{victim} killed", f"all ranks ended, {state(run)['state']}", last_step(run) - newest(run))


def test_a_terminal_that_closes(straight, tmp_path, report):
    """As a window that is shut, or a connection that is lost: all of its processes get SIGHUP, some twice."""
    run = tmp_path / "closed"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    shown = launch_command("--recipe", RECIPE, "--output-dir", str(run), *settings, ranks=2)
    window = "import pty, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); pty.spawn(sys.argv[1:])"
    terminal = subprocess.Popen(
        [sys.executable, "-c", window, *shown],
        cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: last_step(run) >= EVERY + 1, terminal, timeout=600)
        ranks = ranks_of(terminal)
        terminal.kill()
        psutil.wait_procs(ranks, timeout=120)
        wait_until_gone(run)
    finally:
        end_tree(terminal)
    assert (state(run)["state"], state(run)["reason"]) == ("preempted", "SIGHUP")
    stopped = newest(run)
    assert stopped == last_step(run)
    complete(run)
    assert curve(run) == curve(straight)
    report("terminal closed", f"preempted at step {stopped}, resumed bit-identical", 0)


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_full_disk(tmp_path, report, choice):
    folder = tmp_path / "small"
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    run = folder / "run"
    try:
        done = train(
            RECIPE, run, *SMALL, "training.steps=20", f"checkpoint.on_write_error={choice}", timeout=1200
        )
        complete = newest(run)
        assert complete >= EVERY, "room for one checkpoint and not for two"
        assert done.returncode == 1
        assert "needed" in done.stdout + done.stderr
        assert not list(run.glob("checkpoints/.step-*.incomplete"))
        reached = last_step(run)
        assert reached == (20 if choice == "continue" else complete + EVERY)
        assert state(run)["state"] == "failed", "no room for a new file, and it must not stay at running"
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    report(
        f"disk full, {choice}",
        f"checkpoint of step {complete} stayed, training went to step {reached}",
        reached - complete,
    )


def test_a_read_only_folder(tmp_path, report):
    mount(tmp_path, "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        done = train(RECIPE, tmp_path / "run", *SMALL, ranks=1, timeout=600)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 2
    assert "cannot write into" in done.stderr
    assert "Traceback" not in done.stderr
    report("read-only folder", "one message, exit code 2", "-")


def mount(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")


PHASES: dict[str, Callable[[Path], object]] = {
    "start-up": lambda run: (run / "lock.json").exists(),
    "evaluation": lambda run: last_step(run) >= 10,
    "saving": lambda run: last_step(run) >= EVERY and list(run.glob("checkpoints/.step-*.incomplete")),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_in_each_phase(straight, tmp_path, report, phase, name):
    run = tmp_path / "signalled"
    extra = ("evaluation.tasks=[n2d,d2n]", "evaluation.every_steps=10", "evaluation.max_new_tokens=40") * (
        phase == "evaluation"
    )
    command = start(RECIPE, run, *SMALL, *extra)
    try:
        wait_until(lambda: PHASES[phase](run), command, timeout=900)
        for rank in ranks_of(command):
            rank.send_signal(getattr(signal, name))
        assert command.wait(timeout=300) == 0
    finally:
        end_tree(command)
    assert state(run)["state"] == "preempted"
    assert name in state(run)["reason"]
    stopped = newest(run)
    assert stopped == last_step(run)
    complete(run, *extra)
    assert curve(run) == curve(straight)
    if phase == "evaluation":
        assert [line["step"] for line in metrics(run, "evaluation")] == list(range(10, STEPS + 1, 10))
    report(f"{name} in {phase}", f"preempted at step {stopped}, resumed bit-identical", 0)


def test_a_second_signal(straight, tmp_path, report):
    run = tmp_path / "twice"
    command = start(RECIPE, run, *SMALL)
    try:
        wait_until(lambda: last_step(run) >= EVERY + 1, command, timeout=600)
        for rank in (ranks := ranks_of(command)):
            rank.send_signal(signal.SIGTERM)
        wait_until(lambda: list(run.glob("checkpoints/.step-*.incomplete")), command, timeout=100)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert command.wait(timeout=100) != 0
        seconds = time.monotonic() - began
    finally:
        end_tree(command)
    lost = last_step(run) - newest(run)
    assert_same_course(complete(run), straight)
    report("SIGTERM twice", f"ended within {seconds:.0f} s while saving; resumed bit-identical", lost)
