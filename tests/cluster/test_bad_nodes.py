"""Which node a job leaves out when it is requeued: by files of failed starts, and by the batch script in bash."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from bico_ds.cluster.attempts import TRY_AGAIN, begin, end
from bico_ds.cluster.bad_nodes import Suspect, excluded_file, excluded_nodes, note, suspect
from bico_ds.cluster.run_status import read_statuses
from bico_ds.commands.slurm.status import make_table
from bico_ds.runtime.run_folder import RunFolder
from tests import ROOT

XID = {"gpu": "0000:3b:00", "code": 79, "text": "GPU has fallen off the bus", "time": None}


def fail(run, *, host="n2", run_id="r1", state="failed", **nodes):
    """A start that failed on a node, and what the nodes told: their Xids."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    told = {
        "state": state,
        "step": None,
        "reason": "",
        "run_id": run_id,
        "failed_rank": 1,
        "failed_host": host,
    }
    (run / "state.json").write_text(json.dumps(told))
    for name, xids in nodes.items():
        report = {"host": name, "run_id": run_id, "gpus": [], "xids": xids}
        (run / "logs" / f"node-{name}.json").write_text(json.dumps(report))


def test_a_hardware_error_blames_its_node_at_once(tmp_path):
    fail(tmp_path, n1=[], n2=[XID])
    assert suspect(tmp_path, job="1", before=None) == Suspect("n2", "Xid 79 of GPU 0000:3b:00")


def test_the_failed_rank_s_node_comes_before_another_with_an_error(tmp_path):
    fail(tmp_path, host="n3", n2=[XID], n3=[XID])
    assert suspect(tmp_path, job="1", before=None).host == "n3"
    fail(tmp_path, host="n1", run_id="r2", n2=[XID])
    assert suspect(tmp_path, job="1", before="r1").host == "n2", "an error speaks louder than a rank's end"


def test_without_an_error_the_second_failure_of_one_job_on_a_node_blames_it(tmp_path):
    fail(tmp_path)
    first = suspect(tmp_path, job="1", before=None)
    assert first == Suspect("n2", "")
    note(tmp_path, first, job="1", is_excluded=False)
    fail(tmp_path, run_id="r2")
    assert suspect(tmp_path, job="1", before="r1").why
    assert suspect(tmp_path, job="2", before="r1").why == "", "another job is another matter"


@pytest.mark.parametrize("state", ["done", "preempted"])
def test_a_start_that_did_not_fail_blames_nobody(tmp_path, state):
    fail(tmp_path, state=state, n2=[XID])
    assert suspect(tmp_path, job="1", before=None) is None


def test_the_failure_of_an_earlier_start_and_an_unknown_node_blame_nobody(tmp_path):
    fail(tmp_path, n2=[XID])
    assert suspect(tmp_path, job="1", before="r1") is None
    fail(tmp_path, host=None, run_id="r2")
    assert suspect(tmp_path, job="1", before="r1") is None
    assert suspect(tmp_path / "nowhere", job="1", before=None) is None


@pytest.mark.parametrize("host", ["n1 ; touch ran", "-n1", "n1\n", "", 7, "n" * 300, "n[1-9]"])
def test_what_is_no_name_of_a_node_is_never_given_to_slurm(tmp_path, host):
    fail(tmp_path, host=host)
    assert suspect(tmp_path, job="1", before=None) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"failed": 1, "excluded": [{"host": 3}, 4]}', "\0", "[" * 5000]
)
def test_a_broken_record_holds_nothing_and_is_replaced(tmp_path, content):
    excluded_file(tmp_path).parent.mkdir()
    excluded_file(tmp_path).write_text(content)
    assert excluded_nodes(tmp_path, "1") == []
    note(tmp_path, Suspect("n2", "Xid 79"), job="1", is_excluded=True)
    assert excluded_nodes(tmp_path, "1") == ["n2"]
    assert excluded_nodes(tmp_path, "2") == []


def test_a_start_without_progress_is_worth_another_where_its_node_is_left_out(tmp_path):
    begin(tmp_path, job="1", restarts=0, limit=3)
    fail(tmp_path, n2=[XID])
    assert end(tmp_path, srun_code=1, stopped=False, restarts=0, limit=3).exit_code == 1
    verdict = end(tmp_path, srun_code=1, stopped=False, restarts=0, limit=3, excluded="n2")
    assert verdict.exit_code == TRY_AGAIN
    assert "without node n2" in verdict.why
    assert end(tmp_path, srun_code=1, stopped=False, restarts=3, limit=3, excluded="n2").exit_code not in (
        0,
        TRY_AGAIN,
    )


COMMANDS = {
    "srun": f"""#!{sys.executable}
import json, os, sys
run = os.environ["RUN"]
log = [word for word in sys.argv if word.startswith("--output=")][0][9:]
open(log, "a").close()
if "bico_ds.commands.train" in sys.argv:
    number = sum(line.startswith("train") for line in open(os.environ["CALLS"])) + 1
    print("train", file=open(os.environ["CALLS"], "a"))
    state = dict(state="failed", step=None, reason="CUDA error", run_id=f"r{{number}}", failed_host="n2")
    json.dump(state, open(run + "/state.json", "w"))
    report = dict(host="n2", run_id=f"r{{number}}", gpus=[], xids=json.loads(os.environ["XIDS"]))
    json.dump(report, open(run + "/logs/node-n2.json", "w"))
    sys.exit(1)
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[ "$1 $2" != "show job" ] || echo "JobId=9 JobState=RUNNING ExcNodeList=${EXCLUDED:-(null)} Partition=p"
""",
    "sbatch": """#!/bin/bash
echo "sbatch $*" >> "$CALLS"
exit "${ENOUGH:-0}"
""",
    "sleep": "#!/bin/bash\n",
    "python": f"""#!/bin/bash
case "$*" in *bico_ds.commands.slurm.native_ops*) exit 0 ;; esac
exec {sys.executable} "$@"
""",
}  # fmt: skip


def run_script(folder, *, xids=(XID,), **changed):
    """The batch script until its end: exit code, output, and the calls of SLURM's commands that matter."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls), "RUN": str(folder / "run"), "PROJECT": str(ROOT),
        "PYTHON": str(commands / "python"), "XIDS": json.dumps(list(xids)), "SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(folder), **changed,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm" / "train.sbatch")], cwd=folder, env=environment, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    matter = ("scontrol requeue", "scontrol update", "sbatch")
    return (
        done.returncode,
        done.stdout,
        [line for line in calls.read_text().splitlines() if line.startswith(matter)],
    )


def test_the_script_excludes_the_node_after_the_job_is_requeued(tmp_path):
    code, output, calls = run_script(tmp_path, EXCLUDED="n5")
    assert code == TRY_AGAIN, output
    test, *others = calls
    assert test.startswith("sbatch --test-only --nodes=2 --exclude=n5,n2 ")
    assert others == ["scontrol requeue 9", "scontrol update jobid=9 ExcNodeList=n5,n2"]
    assert "node n2 may be bad: Xid 79" in output
    assert excluded_nodes(tmp_path / "run", "9") == ["n2"]


def test_a_task_of_an_array_is_named_by_its_number_for_the_job_id_of_the_last_means_all(tmp_path):
    """Seen with SLURM 22.05: `scontrol requeue` with SLURM_JOB_ID of the last task restarted its running neighbours."""
    _, output, calls = run_script(tmp_path, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="3")
    assert calls[1:] == ["scontrol requeue 9_3", "scontrol update jobid=9_3 ExcNodeList=n2"], output


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"ENOUGH": "1"}, "too few others"), ({"MAX_EXCLUDED": "0"}, "0 nodes may be (--max-excluded)")],
)
def test_no_node_is_excluded_that_slurm_cannot_do_without_or_beyond_the_limit(tmp_path, changed, told):
    code, output, calls = run_script(tmp_path, **changed)
    assert code == 1
    assert told in output
    assert not [call for call in calls if not call.startswith("sbatch")]
    assert excluded_nodes(tmp_path / "run", "9") == []


def test_a_failure_that_no_node_is_to_blame_for_changes_nothing(tmp_path):
    code, output, calls = run_script(tmp_path, xids=())
    assert (code, calls) == (1, []), output


def test_status_names_the_slow_rank_with_its_node_and_the_nodes_that_are_left_out(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.jsonl").write_text('{"job": "1"}\n')
    (tmp_path / "run.json").write_text(json.dumps([{"run_id": "r1", "hosts": ["n1", "n2"]}]))
    line = {"step": 4, "kind": "train", "speed/slowest_rank": 1, "speed/slowest_rank_factor": 2.04}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "state.json").write_text(
        json.dumps({"state": "running", "step": 4, "reason": "", "run_id": "r1"})
    )
    note(tmp_path, Suspect("n3", "Xid 79"), job="1", is_excluded=True)
    lock = RunFolder(tmp_path).lock
    lock.run_id = "r1"
    lock.take()
    (status,) = read_statuses([tmp_path])
    assert status.slow == "rank 1 on n2 works 2.0 times as long as the others"
    assert status.excluded == ("n3",)
    console = Console(file=io.StringIO(), width=300)
    console.print(make_table([status]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "slow: rank 1 on n2" in shown and "excluded: n3" in shown
    lock.release()
    line["speed/slowest_rank_factor"] = 1.1
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_statuses([tmp_path])[0].slow == ""
