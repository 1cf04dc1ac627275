"""Other ways to start the same run: arrays, containers, the plain script, and two nodes without SLURM."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.cluster.two_nodes.drill import PYTHON, ROOT, TINY, Run, native_ops
from tests.cluster.two_nodes.settings import ADDRESSES, NODES

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
TRAIN = str(ROOT / "launch" / "train.py")


def overrides(*sets):
    return [part for key in (*TINY, *sets) for part in ("--set", key)]


def assert_equal_result(run, reference):
    assert run.state().get("state") == "done"
    assert run.losses() == reference.losses()
    assert run.weights() == reference.weights()


def test_an_array_of_four_trains_four_runs(workspace, note):
    run = workspace.submit(
        "sweep", "--seeds", "1", "2", "3", "4", "--max-parallel", "2", nodes=1, sets=("training.steps=10",)
    )
    elements = [f"{run.job}_{n}" for n in range(4)]

    def ended():
        return not workspace.cluster.slurm("squeue", "--noheader", "--job", run.job, check=False).strip()

    run.wait_for(ended, "the end of the array")
    states = [
        workspace.cluster.slurm("scontrol", "show", "job", "--oneliner", element) for element in elements
    ]
    outputs = "".join(p.read_text()[-1500:] for p in (run.path / "slurm").glob("job-*.out"))
    assert all("JobState=COMPLETED" in state for state in states), outputs
    runs = [Run(workspace.cluster, run.path / f"tiny_base-seed-{seed}", run.job) for seed in (1, 2, 3, 4)]
    assert len({one.weights() for one in runs}) == 4
    shown = workspace.command("launch/slurm/status.py", "--json", str(run.path))
    statuses = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(s["state"], s["step"], s["job"]) for s in statuses] == [("done", 10, e) for e in elements]
    note(
        "4 COMPLETED, two at a time, each in a folder of its own with weights of its own; status.py shows all"
    )


def test_the_script_runs_inside_a_container(workspace, reference, note, tmp_path):
    """A stand-in for apptainer that records its arguments and runs the command: SLURM's own commands stay
    outside.
    """
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n'
        'while [ "$1" != "IMAGE.sif" ]; do shift; done; shift; export IN_CONTAINER=1; exec "$@"\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    (workspace.folder / "IMAGE.sif").write_text("")
    workspace.environment["PATH"] = f"{stand_in.parent}:{os.environ['PATH']}"
    try:
        run = workspace.submit("contained", "--container", "IMAGE.sif", "--python", PYTHON)
    finally:
        del workspace.environment["PATH"]
    assert run.wait_for_end()["JobState"] == "COMPLETED", run.story()
    assert_equal_result(run, reference)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len([call for call in calls if "bico_ds.commands.train" in call]) == 2, "once per rank"
    assert all("exec --nv --bind" in call and str(run.path) in call for call in calls)
    note("every Python call went through `apptainer exec` (a stand-in), equal result")


def test_the_plain_script_is_enough(workspace, reference, note):
    run_path = workspace.folder / "plain-script"
    variables = {
        "RECIPE": "tiny_base", "RUN": str(run_path), "PROJECT": str(ROOT), "PYTHON": PYTHON,
        "TORCH_EXTENSIONS_DIR": str(native_ops()),
    }  # fmt: skip
    text = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    mine = workspace.folder / "mine.sbatch"
    mine.write_text(text.replace("OVERRIDES=() ", f"OVERRIDES=({' '.join(overrides())}) "))
    done = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
         "--time=15", str(mine)],
        cwd=workspace.folder, env=workspace.variables() | variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Run(workspace.cluster, run_path, done.stdout.strip())
    assert run.wait_for_end()["JobState"] == "COMPLETED", run.story()
    assert_equal_result(run, reference)
    note("launch/slurm/train.sbatch, edited by hand: COMPLETED, equal result")


def test_deepspeed_starts_both_nodes_over_ssh(workspace, reference, note):
    run = Run(workspace.cluster, workspace.folder / "over-ssh", "")
    hostfile = workspace.folder / "hostfile"
    example = (ROOT / "launch" / "hostfile.example").read_text().splitlines()
    hosts = [line.split()[0] for line in example if line.strip() and not line.startswith("#")]
    assert len(hosts) == 2, "the example is made for this drill"
    hostfile.write_text("\n".join(f"{node} slots=1" for node in NODES) + "\n")
    (workspace.folder / ".deepspeed_env").write_text(
        f"OMP_NUM_THREADS=1\nTORCH_EXTENSIONS_DIR={native_ops()}\n"
    )
    command = [
        str(Path(PYTHON).parent / "deepspeed"), "--hostfile", str(hostfile), "--master_addr", ADDRESSES["n1"],
        "--master_port", "29751", TRAIN, "--recipe", "tiny_base", "--output-dir", str(run.path), *overrides(),
    ]  # fmt: skip
    ssh = {"PDSH_SSH_ARGS_APPEND": f"-F {workspace.cluster.folder}/ssh_config"}
    wrapper = ssh_command(workspace.cluster.folder)
    path = f"{wrapper}:{Path(PYTHON).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        workspace.cluster.on_node("n1", command), cwd=workspace.folder, capture_output=True, text=True,
        env=workspace.variables() | ssh | {"PATH": path}, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_equal_result(run, reference)
    note("`deepspeed --hostfile` over ssh and pdsh: done, exit code 0, equal result")


def ssh_command(folder):
    """A folder with an `ssh` that knows the cluster's key: deepspeed first tries `ssh HOST hostname`."""
    path = folder / "bin" / "ssh"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    path.chmod(0o755)
    return path.parent


def test_torchrun_starts_one_agent_a_node(workspace, reference, note):
    run = Run(workspace.cluster, workspace.folder / "by-torchrun", "")
    torchrun = [
        str(Path(PYTHON).parent / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d",
        "--rdzv-id", "drill", "--rdzv-endpoint", f"{ADDRESSES['n1']}:29761",
    ]  # fmt: skip
    train = [TRAIN, "--recipe", "tiny_base", "--output-dir", str(run.path), *overrides()]
    logs = {node: workspace.folder / f"torchrun-{node}.log" for node in NODES}
    agents = []
    for node, log in logs.items():
        with open(log, "wb") as output:
            agents.append(
                subprocess.Popen(
                    workspace.cluster.on_node(node, [*torchrun, *train]), cwd=workspace.folder, stdout=output,
                    stderr=output, env=workspace.variables() | {"TORCH_EXTENSIONS_DIR": str(native_ops())},
                )
            )  # fmt: skip
    codes = [agent.wait(timeout=600) for agent in agents]
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs.values()]
    assert_equal_result(run, reference)
    note("one agent per node, c10d rendezvous: done, exit codes 0, equal result")
