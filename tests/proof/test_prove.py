"""The proof as a whole: every part gets its turn, results are kept as they come, and a later call goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bico_ds.common.errors import RunError, UserError
from bico_ds.proof import prove as prove_module
from bico_ds.proof import results
from bico_ds.proof.machine import describe_machine
from bico_ds.proof.parts import PARTS
from bico_ds.proof.prove import Request, node_problems, part_environment, prove
from bico_ds.proof.results import Result
from tests import ROOT
from tests.proof import tools_of_a_proof as tools
from tests.proof.test_processes import alive

SOURCES = {
    "check": tools.HANGS,
    "speed": tools.WRONG,
    "policy": tools.CRASHES,
    "step": tools.SAYS_ONLY_THAT_IT_IS_WRONG,
    "baselines": tools.WITHOUT_FINDINGS,
    "run": tools.RIGHT,
    "elementwise": tools.NOT_MEASURED,
    "fused_adam": tools.NOT_MEASURED,
}
STATUS = {
    "check": "cut", "speed": "wrong", "policy": "failed", "step": "wrong", "baselines": "failed", "run": "right",
    "elementwise": "not measured", "fused_adam": "not measured", "nccl": "failed",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """Every kind of part; the tool of the last is not there."""
    folder = tmp_path / "bench"
    for name, source in SOURCES.items():
        monkeypatch.setitem(PARTS, name, tools.part(folder, name, source))
    monkeypatch.setitem(PARTS, "nccl", tools.part(folder, "nccl", ""))
    (folder / "nccl.py").unlink()
    monkeypatch.setattr(prove_module, "REHEARSAL_SECONDS", 60.0)
    return folder


def request(tmp_path, *, parts=None, minutes=6.0, again=False) -> Request:
    return Request(
        parts=parts or list(PARTS), out=tmp_path / "out", minutes=minutes, rehearse=True, again=again
    )


def report(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())


def statuses(tmp_path) -> dict[str, str]:
    return {part["part"]: part["status"] for part in report(tmp_path)["parts"]}


def test_each_part_runs_whatever_became_of_those_before_and_the_report_names_what_is_wrong(
    bench, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prove_module, "REHEARSAL_SECONDS", 8.0)  # the others need a quarter of a second each
    assert not prove(request(tmp_path))
    assert statuses(tmp_path) == STATUS
    assert not alive(tools.pids(bench, "check"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "measured: 42 TFLOP/s" in page, "what the cut part had said"
    assert page.count("- wrong: aten-cuda is wrong by 0.5") == 2
    assert "**failed**: exit code 1: the driver is gone" in page
    assert "**not measured**: no nvcc" in page
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("gpu-proof: ") for line in said)
    bad = "check (cut), speed (wrong), step (wrong), baselines (failed), nccl (failed), policy (failed)"
    assert f"gpu-proof: not right: {bad}; the same command runs these again" in said


def test_a_later_call_runs_what_is_not_done_and_again_runs_all(bench, tmp_path):
    parts = ["run", "fused_adam", "speed"]
    count = lambda: [tools.calls(bench, name) for name in parts]  # noqa: E731
    assert not prove(request(tmp_path, parts=parts))
    (bench / "speed.py").write_text(tools.RIGHT)
    assert prove(request(tmp_path, parts=parts))
    assert count() == [1, 1, 2]
    assert prove(request(tmp_path, parts=parts))
    assert count() == [1, 1, 2]
    assert prove(request(tmp_path, parts=parts, again=True))
    assert count() == [2, 2, 3]


def test_results_of_another_machine_source_or_version_are_not_taken_over(bench, tmp_path):
    assert prove(request(tmp_path, parts=["run"]))
    machine, kept = describe_machine(rehearse=True), tmp_path / "out" / "parts"
    assert results.load("run", machine, kept) is not None
    for key in ("commit", "gpu", "driver", "sources", "rehearsal", "versions"):
        assert results.load("run", {**machine, key: "another"}, kept) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"machine": {}}',
        '{"machine": {}, "result": []}',
        '{"machine": 1, "result": {"findings": {}}}',
    ],
)
def test_a_file_that_no_proof_wrote_is_no_result(bench, tmp_path, content):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "run.json").write_text(content)
    assert prove(request(tmp_path, parts=["run"]))
    assert statuses(tmp_path) == {"run": "right"}


def keep_result_of_another_machine(tmp_path, **changes) -> Path:
    machine, kept = {**describe_machine(rehearse=True), **changes}, tmp_path / "out" / "parts"
    results.save(Result(part="run", status="right"), machine, kept)
    return kept / "run.json"


def test_a_rehearsal_replaces_nothing_that_a_gpu_gave(bench, tmp_path):
    file = keep_result_of_another_machine(tmp_path, rehearsal=False, gpu="NVIDIA H100")
    before = file.read_bytes()
    with pytest.raises(UserError, match="holds results of NVIDIA H100"):
        prove(request(tmp_path, parts=["run", "speed"]))
    assert file.read_bytes() == before and tools.calls(bench, "run") == 0


def test_results_that_are_not_taken_over_are_said_to_be_replaced(bench, tmp_path, capsys):
    keep_result_of_another_machine(tmp_path, commit="another", sources="others")
    assert prove(request(tmp_path, parts=["run"]))
    assert "differ in commit, sources: they are not taken over" in capsys.readouterr().out
    assert prove(request(tmp_path, parts=["run"]))
    assert "differ in" not in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_one_message(bench, tmp_path):
    (tmp_path / "out" / "run.log").mkdir(parents=True)
    with pytest.raises(RunError, match=r"--out: cannot write '.*run\.log': Is a directory"):
        prove(request(tmp_path, parts=["run"]))
    assert not (tmp_path / "out" / "parts" / "run.json").exists(), "no interruption by the user"


def test_two_proofs_do_not_share_a_folder(bench, tmp_path):
    lock = tmp_path / "out" / "parts" / ".lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another proof is at work in"):
            prove(request(tmp_path, parts=["run"]))
    assert tools.calls(bench, "run") == 0
    assert prove(request(tmp_path, parts=["run"]))


def test_a_part_that_is_named_twice_runs_once(bench, tmp_path, capsys):
    assert not prove(request(tmp_path, parts=["speed", "speed"]))
    assert tools.calls(bench, "speed") == 1
    assert "gpu-proof: not right: speed (wrong); the same" in capsys.readouterr().out


def test_a_full_disk_is_one_message_and_other_errors_are_not_taken_for_it(bench, tmp_path, monkeypatch):
    def fail(path: Path, content: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(results, "write_atomically", fail)
    number = errno.ENOSPC
    with pytest.raises(RunError, match="--out: cannot write '.*out': No space left on device"):
        prove(request(tmp_path, parts=["run"]))
    number = errno.EPIPE
    with pytest.raises(BrokenPipeError):
        prove(request(tmp_path, parts=["run"]))


def test_a_part_on_a_gpu_runs_without_what_would_distort_its_figures(monkeypatch):
    for name in ("DS_ACCELERATOR", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    seen = part_environment(rehearse=False)
    assert not {"DS_ACCELERATOR", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING"} & set(seen)
    assert seen["CUDA_VISIBLE_DEVICES"] == "1", "the user's choice of a GPU"


def test_a_part_that_has_no_time_left_is_said_to_have_none_and_the_next_call_runs_it(bench, tmp_path, capsys):
    assert not prove(request(tmp_path, parts=["run"], minutes=0.01))
    assert tools.calls(bench, "run") == 0
    assert "run: no time left" in capsys.readouterr().out
    assert prove(request(tmp_path, parts=["run"]))


def test_on_a_gpu_a_part_that_would_be_cut_waits_for_the_next_call_and_the_first_of_a_call_does_not(
    bench, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PARTS, "run", replace(PARTS["run"], needs=100.0))
    monkeypatch.setitem(PARTS, "elementwise", replace(PARTS["elementwise"], needs=10.0))
    names = ["elementwise", "run", "fused_adam"]
    on_gpu = replace(request(tmp_path, parts=names), rehearse=False)
    machine = prove_module.describe_machine(rehearse=True)
    proof = prove_module._Proof(request=on_gpu, bench=bench, machine=machine)
    proof.kept.mkdir(parents=True)
    calls = [list(prove_module._run_parts(proof, time.monotonic() + 60)) for _ in range(2)]
    first, second = ([result.status for result in call] for call in calls)
    assert first == ["not measured", "no time", "not measured"], "what needs less goes on"
    assert second == ["not measured", "right", "not measured"]
    assert "run: no time left (it needs 100 s): a next call runs it" in capsys.readouterr().out


def test_no_part_gets_more_than_the_minutes_leave(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(prove_module, "REHEARSAL_SECONDS", 600.0)
    started = time.monotonic()
    assert not prove(request(tmp_path, parts=["check"], minutes=0.15))
    assert time.monotonic() - started < 120


def test_a_part_sees_no_launcher_no_network_and_in_a_rehearsal_no_gpu(bench, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    (bench / "run.py").write_text(tools.BEGIN + "end(notes=[json.dumps(dict(os.environ))])")
    assert prove(request(tmp_path, parts=["run"]))
    seen = json.loads(report(tmp_path)["parts"][0]["findings"]["notes"][0])
    assert not {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    } & set(seen)
    assert (seen["HF_HUB_OFFLINE"], seen["CUDA_VISIBLE_DEVICES"], seen["DS_ACCELERATOR"]) == ("1", "", "cpu")


PROVES = """
import signal, sys
from pathlib import Path
# As in a terminal: what started the tests may ignore them (nohup, a shell's "&"), and they would be inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from bico_ds.commands.gpu_proof import main
from bico_ds.proof.parts import PARTS, Part
for name in ("run", "check"):
    PARTS[name] = Part(name=name, question="?", tool=str(Path(sys.argv[1], name + ".py")), seconds=60)
main.start(["--rehearse", "--parts", "run", "check", "--out", sys.argv[2]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_keeps_all_results_so_far_and_leaves_no_process(bench, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROVES, str(bench), str(tmp_path / "out")], cwd=ROOT, start_new_session=True
    )
    while not tools.pids(bench, "check") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert statuses(tmp_path) == {"check": "interrupted", "run": "right"}
    assert "measured: 42 TFLOP/s" in (tmp_path / "out" / "report.md").read_text()
    assert len(tools.pids(bench, "check")) == 3 and not alive(tools.pids(bench, "check"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("run", None),
        ("speed", "wrong: aten-cuda is wrong by 0.5"),
        ("policy", "failed: exit code 1: the driver is gone"),
    ],
)
def test_a_node_is_judged_by_the_check_part_alone(bench, monkeypatch, name, problem):
    monkeypatch.setitem(PARTS, "check", PARTS[name])
    expected = [] if problem is None else [f"the check of the attention backends: {problem}"]
    assert node_problems(on_cuda=False) == expected
    assert sum(tools.calls(bench, each) for each in SOURCES) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_cuda_device_one_line_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_proof.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA device: torch ") and done.stderr.count("\n") == 1
    assert "--rehearse" in done.stderr
    assert list(tmp_path.iterdir()) == []
