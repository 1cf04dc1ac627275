"""Runs in turn: how far each is, how long it takes, what it printed; and how a failure and Ctrl-C end them."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bico_ds.cluster.local.forecast import Forecast, LocalRun, Watch
from bico_ds.cluster.local.in_turn import about, train_in_turn
from bico_ds.common.errors import UserError
from bico_ds.runtime.run_folder import RunFolder
from tests import ROOT

STEPS = 700


def a_run(folder: Path, program: str = "", *, steps: int | None = STEPS) -> LocalRun:
    """A run whose launcher is a program in Python that gets the run folder as `run`."""
    head = f"import json, os, pathlib, sys, time\nrun = pathlib.Path({str(folder)!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(program)]
    return LocalRun(name=folder.name, folder=RunFolder(folder), command=command, steps=steps)


def state_of(state: str = "done", *, step: int = STEPS, run_id: str = "new", reason: str = "") -> str:
    return json.dumps({"state": state, "step": step, "reason": reason, "run_id": run_id, "time": time.time()})


def record(folder: Path, state: str, **facts: Any) -> None:
    """Write the state file of a run."""
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(state_of(state, **facts))


def recording(state: str = "done", **facts: Any) -> str:
    """A line of a program that does the same."""
    return f"(run / 'state.json').write_text({state_of(state, **facts)!r})\n"


def reach(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": step, "kind": "train", "loss/all": 1.0}) + "\n")


def train(*runs: LocalRun, is_terminal: bool = False) -> tuple[int, str]:
    """The exit code, and what is shown."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=80, soft_wrap=True)
    return train_in_turn(runs, os.environ, console), out.getvalue()


def test_each_start_has_a_log_of_its_own_with_its_command_and_all_that_is_printed(tmp_path):
    program = "print('to stdout', flush=True)\nprint('to stderr', file=sys.stderr)\n" + recording()
    for number in (1, 2):
        code, shown = train(a_run(tmp_path / "a", program))
        log = tmp_path / "a" / "logs" / f"launch-{number}.log"
        assert (code, shown.count("\n")) == (0, 2)
        assert shown.splitlines()[0] == f"a (1 of 1): starting; its output: {log}"
        assert log.read_text().startswith(f"$ {sys.executable} -c ")
        assert log.read_text().endswith("\nto stdout\nto stderr\n")
    assert shown.splitlines()[1] == "a (1 of 1): was done before"


def test_a_terminal_has_one_line_per_run(tmp_path):
    runs = [a_run(tmp_path / name, recording()) for name in ("a", "b")]
    code, shown = train(*runs, is_terminal=True)
    assert code == 0
    assert shown.count("\n") == 2 and "launch-1.log" not in shown
    assert "a (1 of 2)" in shown and "700/700" in shown and re.search(r"done in \d+ s", shown)


def test_a_failure_ends_all_with_its_exit_code_its_error_and_the_name_of_its_log(tmp_path, capsys):
    program = """
        print("step 1/700 loss 2.0")
        print("error: a \\x1b[31mlong message\\nof two lines")
        print("[2026-11-27 20:38:57,141] [INFO] [launch.py:245:main] Process 17528 exits")
        sys.exit(3)
    """
    code, shown = train(a_run(tmp_path / "a", program), a_run(tmp_path / "b"))
    assert code == 3
    assert shown.endswith("a (1 of 2): failed\n")
    first, *others = capsys.readouterr().err.splitlines()
    assert (
        first
        == f"error: a ended with exit code 3; all of its output: {tmp_path / 'a' / 'logs' / 'launch-1.log'}"
    )
    assert others == ["error: a  [31mlong message", "of two lines"]
    assert not (tmp_path / "b").exists()


def test_a_failure_without_a_message_shows_the_end_of_the_log_and_the_reason_in_the_state(tmp_path, capsys):
    program = "for n in range(99): print('line', n)\n"
    program += recording("failed", reason="rank 1: killed") + "os.kill(os.getpid(), 9)"
    code, _ = train(a_run(tmp_path / "a", program))
    assert code == -signal.SIGKILL
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "failed: rank 1: killed"
    assert "line 0" not in shown


def test_a_run_that_was_stopped_is_no_success_although_its_launcher_ended_well(tmp_path, capsys):
    program = recording("preempted", step=20, reason="SIGTERM")
    code, _ = train(a_run(tmp_path / "a", program), a_run(tmp_path / "b"))
    assert code == 1
    assert "preempted: SIGTERM" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write into '.*a/logs': .*choose another folder with --runs"):
        train(a_run(tmp_path / "a"))


def test_the_time_left_is_unknown_until_there_is_a_pace_and_then_counts_the_runs_that_follow(tmp_path):
    record(tmp_path / "a", "running", step=0)
    run, later = a_run(tmp_path / "a"), [a_run(tmp_path / "b"), a_run(tmp_path / "c")]
    watch, forecast = Watch(run, began=0.0, before="old"), Forecast()

    def at(now: float, step: int | None = None) -> tuple[float | None, float | None]:
        if step is not None:
            reach(tmp_path / "a", step)
        watch.look(now)
        forecast.learn(watch)
        return forecast.of_run(watch, now), forecast.of_later(later)

    assert at(10.0) == (None, None)
    assert at(12.0, 10) == (None, None)  # ten steps
    assert at(14.0, 100) == (pytest.approx(600 * 0.04), pytest.approx(2 * (10.0 + 700 * 0.04)))
    assert at(15.0) == (pytest.approx(600 * 0.04 - 1.0), pytest.approx(2 * (10.0 + 700 * 0.04)))
    at(40.0, 700)
    forecast.learn(watch, ended=45.0)  # it was exported meanwhile
    record(tmp_path / "b", "done")
    assert forecast.of_later(later) == pytest.approx(15.0 + 15.0 + 30.0)
    after = Watch(later[1], began=50.0, before=None)
    assert forecast.of_run(after, 55.0) == pytest.approx(10.0 + 30.0)
    assert forecast.of_later([a_run(tmp_path / "d", steps=None)]) is None


def test_what_an_earlier_start_left_is_not_this_one_s_progress(tmp_path):
    record(tmp_path / "a", "preempted", step=300, run_id="old")
    reach(tmp_path / "a", 300)
    watch = Watch(a_run(tmp_path / "a"), began=0.0, before="old")
    watch.look(1.0)
    assert watch.last is None and watch.run.steps_left() == 400
    record(tmp_path / "a", "running", step=300)
    watch.look(9.0)
    reach(tmp_path / "a", 340)
    watch.look(13.0)
    assert (watch.step, watch.seconds_per_step()) == (340, 0.1)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0, "5 s"), (42.0, "40 s"), (99.0, "100 s"), (130.0, "2 min"), (9000.0, "2.5 h")]
)
def test_times_are_as_exact_as_they_are_known(seconds, said):
    assert about(seconds) == said


def test_ctrl_c_waits_for_the_ranks_to_save_and_ends_all(tmp_path):
    """The launcher dies at once, as DeepSpeed's does; its rank writes a file before it ends."""
    rank = "import pathlib, signal, sys, time\n"
    rank += f"saved = pathlib.Path({str(tmp_path / 'saved')!r})\n"
    rank += "def stop(*_): time.sleep(1.5); saved.write_text(''); sys.exit()\n"
    rank += "signal.signal(signal.SIGINT, stop)\n"
    rank += f"run = pathlib.Path({str(tmp_path / 'a')!r})\n{recording('running', step=0)}time.sleep(60)\n"
    launcher = f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    run = a_run(tmp_path / "a", launcher)
    program = (
        "import os; from rich.console import Console; from bico_ds.common import progress\n"
        "from bico_ds.cluster.local.forecast import LocalRun\n"
        "from bico_ds.cluster.local.in_turn import train_in_turn\n"
        "from bico_ds.common.command_line import exit_code\n"
        "from bico_ds.runtime.run_folder import RunFolder\n"
        "progress.SECONDS_BETWEEN_LINES = 0.0\n"
        f"run = LocalRun(name='a', folder=RunFolder({str(run.folder.path)!r}), command={list(run.command)!r}, steps=1)\n"
        "os._exit(exit_code(lambda: train_in_turn([run], os.environ, Console())))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    # Before the second look that finds the rank at work, it has seen its descendants.
    assert lines[1:] == ["a (1 of 1): step 0 of 1\n"] * 2
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, (tmp_path / "saved").exists()) == (130, True)
    assert (
        errors.strip() == "stopping: a run that trains saves first, and the same command goes on from there"
    )
