"""Runs side by side: how many at a time, in which place, what failures and Ctrl-C do; and how a machine is divided."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_inclusion_exclusion
from rich.console import Console

from bico_ds.cluster.local.forecast import LocalRun
from bico_ds.cluster.local.shares import Share, divide, visible_gpus
from bico_ds.cluster.local.side_by_side import Failure, train_side_by_side
from bico_ds.common.errors import UserError
from bico_ds.runtime.run_folder import RunFolder
from tests import ROOT
from tests.waiting import waited

HEAD = "import json, os, pathlib, signal, sys, time\nrun = pathlib.Path(sys.argv[1])\n"
DONE = "(run / 'state.json').write_text(json.dumps({'state': 'done', 'step': 5, 'run_id': 'new'}))\n"


def a_run(folder: Path, program: str = DONE, *, steps: int | None = 5) -> LocalRun:
    """A run whose launcher is a program in Python that knows its folder as `run`."""
    command = ["-c", HEAD + textwrap.dedent(program), str(folder)]
    return LocalRun(name=folder.name, folder=RunFolder(folder), command=command, steps=steps)


def train(*runs: LocalRun, places: int = 1, is_terminal: bool = False) -> tuple[list[Failure], str]:
    """The failures, and what is shown; a program knows its place as the variable PLACE."""
    out = io.StringIO()
    failures = train_side_by_side(
        runs,
        places=places,
        begin=lambda run, place: ([sys.executable, *run.command], os.environ | {"PLACE": str(place)}),
        console=Console(file=out, force_terminal=is_terminal, width=80, soft_wrap=True),
    )
    return failures, out.getvalue()


def test_as_many_runs_as_there_are_places_train_at_a_time_each_in_a_place_of_its_own(tmp_path):
    """Each run waits until its neighbour is there, too: alone it would fail; and notes who else has its place."""
    program = f"""
        here = run.parent / f"place-{{os.environ['PLACE']}}"
        here.mkdir()  # fails where another has it
        deadline = time.monotonic() + 30
        while len(list(run.parent.glob("place-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        together = len(list(run.parent.glob("place-*")))
        time.sleep(0.5)
        here.rmdir()
        {DONE.strip()}
        sys.exit(together != 2)
    """
    failures, shown = train(*(a_run(tmp_path / name, program) for name in "abcd"), places=2)
    assert failures == []
    begun = [line for line in shown.splitlines() if "starting; its output: " in line]
    assert [line.split(":")[0] for line in begun] == [
        f"{name} ({n} of 4)" for n, name in enumerate("abcd", 1)
    ]


def test_a_failure_is_told_and_the_others_go_on(tmp_path, capsys):
    broken = "print('error: no room left')\nsys.exit(3)\n"
    stopped = (
        "(run / 'state.json').write_text(json.dumps({'state': 'preempted', 'step': 2, 'reason': 'SIGTERM'}))"
    )
    silent = ""  # its launcher ends well, and no run has been recorded
    runs = [
        a_run(tmp_path / n, p)
        for n, p in (("a", broken), ("b", DONE), ("c", stopped), ("d", silent), ("e", DONE))
    ]
    failures, shown = train(*runs)
    assert [failure.run.name for failure in failures] == ["a", "c", "d"]
    assert "a (1 of 5): failed; the others go on" in shown and "e (5 of 5): done in " in shown
    errors = capsys.readouterr().err
    log = tmp_path / "a" / "logs" / "launch-1.log"
    assert f"error: a: ended with exit code 3; all of its output: {log}\nerror: no room left\n" in errors
    assert "error: c: did not finish; all of its output: " in errors and "preempted: SIGTERM" in errors


def test_a_run_that_cannot_be_started_is_a_failure_of_its_own(tmp_path, capsys):
    (tmp_path / "a").write_text("a file")
    failures, _ = train(a_run(tmp_path / "a"), a_run(tmp_path / "b"))
    assert [(failure.run.name, failure.log) for failure in failures] == [("a", None)]
    assert "choose another folder with --output-dir" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "state.json").read_text())["state"] == "done"


def test_the_bar_counts_the_steps_that_are_left_and_runs_where_steps_are_not_known(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "state.json").write_text(json.dumps({"state": "preempted", "step": 3, "run_id": "old"}))
    _, shown = train(a_run(tmp_path / "a"), a_run(tmp_path / "b"), is_terminal=True)
    assert "7/7" in shown
    _, shown = train(a_run(tmp_path / "c"), a_run(tmp_path / "d", steps=None), is_terminal=True)
    assert "2/2" in shown


def test_ctrl_c_lets_all_ranks_save_and_starts_no_other_run(tmp_path):
    """The launchers die at once, as DeepSpeed's do; each rank writes a file before it ends."""
    rank = "import pathlib, signal, sys, time\n"
    rank += "def stop(*_): time.sleep(1.5); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit()\n"
    rank += "signal.signal(signal.SIGINT, stop); pathlib.Path(sys.argv[1], 'up').touch(); time.sleep(60)\n"
    launcher = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {rank!r}, sys.argv[1]]).wait()"
    )
    folders = [str(tmp_path / name) for name in "abc"]
    program = f"""
        import os, sys
        from rich.console import Console
        from bico_ds.cluster.local.forecast import LocalRun
        from bico_ds.cluster.local.side_by_side import train_side_by_side
        from bico_ds.common.command_line import exit_code
        from bico_ds.runtime.run_folder import RunFolder
        runs = [LocalRun(name=f[-1], folder=RunFolder(f), command=[sys.executable, "-c", {launcher!r}, f], steps=1)
                for f in {folders!r}]
        begin = lambda run, place: (run.command, os.environ)
        work = lambda: train_side_by_side(runs, places=2, begin=begin, console=Console())
        os._exit(exit_code(work))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    up = [tmp_path / name / "up" for name in "ab"]
    waited(lambda: all(path.exists() for path in up))
    time.sleep(1.5)  # it has seen the ranks among its descendants
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [(tmp_path / name / "saved").exists() for name in "abc"] == [True, True, False]
    assert (
        errors.strip() == "stopping: a run that trains saves first, and the same command goes on from there"
    )


@pytest.mark.parametrize(
    ("places", "ranks", "gpus", "shares"),
    [
        (1, None, [], [(1, (), 16)]),
        (4, None, [], [(1, (), 4)] * 4),
        (4, 2, [], [(2, (), 2)] * 4),
        (32, 2, [], [(2, (), 1)] * 32),
        (1, None, ["0", "1"], [(2, ("0", "1"), 8)]),
        (2, None, ["4", "5", "6", "7", "9"], [(2, ("4", "5"), 4), (2, ("6", "7"), 4)]),
        (2, 1, ["0", "1", "2"], [(1, ("0",), 8), (1, ("1",), 8)]),
    ],
)
def test_a_machine_is_divided_so_that_no_two_runs_have_a_gpu_or_core_in_common(places, ranks, gpus, shares):
    found = divide(places, ranks=ranks, gpus=gpus, cores=16)
    assert [(share.ranks, share.gpus, share.threads) for share in found] == shares


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match=r"--jobs 3: more than the 2 visible GPU"):
        divide(3, ranks=None, gpus=["0", "1"], cores=8)
    with pytest.raises(
        UserError, match=r"--jobs 2 x --ranks 2: each rank needs a GPU of its own, and 3 are visible"
    ):
        divide(2, ranks=2, gpus=["0", "1", "2"], cores=8)


def test_visible_gpus_are_those_that_the_user_leaves_and_have_numbers():
    assert visible_gpus(2, {}) == ["0", "1"]
    assert visible_gpus(2, {"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus(0, {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus(2, {"DS_ACCELERATOR": "cpu"}) == []
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES: .* not as 'GPU-1a2b'"):
        visible_gpus(1, {"CUDA_VISIBLE_DEVICES": "GPU-1a2b"})


def test_the_launcher_gets_the_gpus_by_the_variable_that_it_reads_and_threads_unless_the_user_set_them():
    """Told a number DeepSpeed's launcher ignores the variable; its own parser says which GPUs the ranks then have."""
    share = Share(ranks=2, gpus=("2", "3"), threads=4)
    assert share.launcher_words("deepspeed", 29000) == ["deepspeed", "--master_port", "29000"]
    environment = share.environment({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "HOME": "/h"})
    assert environment == {"CUDA_VISIBLE_DEVICES": "2,3", "HOME": "/h", "OMP_NUM_THREADS": "4"}
    chosen = parse_inclusion_exclusion(
        {"localhost": 4}, f"localhost:{environment['CUDA_VISIBLE_DEVICES']}", ""
    )
    assert chosen == {"localhost": [2, 3]}
    on_cpus = Share(ranks=2, gpus=(), threads=4)
    assert on_cpus.launcher_words("deepspeed", 1)[1:3] == ["--num_accelerators", "2"]
    assert on_cpus.environment({"OMP_NUM_THREADS": "7"}) == {"OMP_NUM_THREADS": "7"}
