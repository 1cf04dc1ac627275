"""The batch script itself, in bash, with stand-ins for SLURM's commands: what it does when a step is killed.

The real SLURM is in tests/cluster/two_nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT

SRUN = """#!/bin/bash
# The next line of $STEPS is how this step ends: "CODE a rank's message | srun's message".
for word in "$@"; do case $word in --output=*) log=${word#--output=} ;; esac; done
[ "${*: -1}" = true ] && { echo idle >> "$CALLS"; exit 0; }
case "$*" in
*bico_ds.commands.train*)
    echo train >> "$CALLS"
    printenv TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_BUFFER_SIZE TORCH_FR_DUMP_TEMP_FILE > "$CALLS.recorder"
    echo '{"state": "done", "step": 7, "reason": "", "run_id": "new"}' > "$RUN/state.json"
    exit 0 ;;
esac
echo preflight >> "$CALLS"
line=$(sed -n "$(grep -c preflight "$CALLS")p" "$STEPS")
code=${line%% *} text=${line#* }
[ -z "${text%%|*}" ] || echo "${text%%|*}" >> "$log"
[ -z "${text#*|}" ] || echo "${text#*|}" >&2
exit "$code"
"""
PYTHON = f"""#!/bin/bash
case "$*" in *bico_ds.commands.slurm.native_ops*) exit 0 ;; esac
exec {sys.executable} "$@"
"""


def run_script(folder, *steps, restarts=0, **changed):
    """Exit code, output, and the steps that were started; `steps` are the ends of its pre-flights."""
    commands = folder / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n1\n"), ("python", PYTHON)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (folder / "steps").write_text("".join(f"{step}\n" for step in steps))
    (folder / "calls").touch()
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "STEPS": str(folder / "steps"), "CALLS": str(folder / "calls"),
        "RUN": str(folder / "run"), "PROJECT": str(ROOT), "PYTHON": str(commands / "python"),
        "RECIPE": "tiny_base", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_RESTART_COUNT": str(restarts), **changed,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm" / "train.sbatch")], cwd=folder, env=environment, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, (folder / "calls").read_text().split()


KILLED = "137 |srun: error: n1: task 0: Killed"


@pytest.mark.parametrize(
    "end", [KILLED, "143 |", "1 |srun: Force Terminated StepId=9.2",
            "137 pre-flight: rank 1 on n2: the collectives fail: Connection reset by peer|"],
)  # fmt: skip
def test_a_killed_pre_flight_is_tried_again_in_a_new_step(tmp_path, end):
    code, output, steps = run_script(tmp_path, end, "0 |")
    assert code == 0, output
    assert steps == ["preflight", "preflight", "train"]
    assert "refused" not in output


def test_without_a_checkout_and_a_python_the_one_on_path_is_taken(tmp_path):
    code, output, steps = run_script(tmp_path, "0 |", PROJECT="", PYTHON="", PYTHONPATH=str(ROOT))
    assert (code, steps) == (0, ["preflight", "train"]), output


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["1", "2000", "logs/flight_recorder/rank-"]),
     ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_FR_DUMP_TEMP_FILE": "/tmp/fr/run/of-"}, ["1", "9", "of-"])],
)  # fmt: skip
def test_what_a_timed_out_collective_leaves_lies_beside_the_stacks_unless_the_user_says_otherwise(
    tmp_path, given, expected
):
    code, output, _ = run_script(tmp_path, "0 |", **given)
    assert code == 0, output
    *numbers, prefix = (tmp_path / "calls.recorder").read_text().split()
    assert [*numbers, prefix.rpartition("/run/")[2]] == expected
    assert (tmp_path / "run" / "logs" / "flight_recorder").is_dir()


def test_a_pre_flight_that_is_killed_each_time_fails_the_job(tmp_path):
    code, output, steps = run_script(tmp_path, KILLED, KILLED, KILLED, "0 |")
    assert (code, steps) == (1, ["preflight"] * 3)
    assert "killed each time; nothing was trained" in output
    assert "srun: error: n1: task 0: Killed" in output


@pytest.mark.parametrize(
    "end",
    [
        "1 pre-flight: this recipe differs: aa on n1, bb on n2|srun: error: n1: task 0: Exited with exit code 1",
        "2 error: unknown key|",
        "1 |",
        "137 pre-flight: the run folder's disk is full|srun: error: n2: task 1: Killed",  # by --kill-on-bad-exit
        "143 error: no recipe 'x'|",
        "137 pre-flight: rank 0 on n1: the collectives fail: all-reduce delivered wrong sums|",
    ],
)
def test_a_refusal_ends_the_job_at_once(tmp_path, end):
    code, output, steps = run_script(tmp_path, end, "0 |")
    assert (code, steps) == (1, ["preflight"]), output
    assert "pre-flight refused this run; nothing was trained" in output


def test_step_numbers_of_two_starts_in_a_row_never_coincide(tmp_path):
    """A first start has at most steps 0 to 3, its restart begins with number 4."""
    code, output, steps = run_script(tmp_path, KILLED, KILLED, "0 |", restarts=1)
    assert code == 0, output
    assert steps == ["idle"] * 4 + ["preflight"] * 3 + ["train"]
