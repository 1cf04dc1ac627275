"""What cannot end well is refused before a step is trained, with a message that names the place."""

from __future__ import annotations

import shutil
import stat

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.data.prepare.recipe_sources import prepare_source
from bico_ds.training.assembly import tokenizer_path
from tests.cluster.two_nodes.drill import PYTHON

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def assert_refused(run, *words):
    record = run.wait_for_end()
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "1:0"), run.story()
    assert record["Restarts"] == "0"
    for word in words:
        assert word in run.output, run.story()
    assert "nothing was trained" in run.output
    assert not run.losses()
    return record


def test_a_broken_recipe_is_refused_by_submit(workspace, note):
    done = workspace.try_submit("broken", sets=("optimizer.weight_decy=0.1",))
    assert done.returncode == 2
    assert "unknown key" in done.stderr
    assert "did you mean" in done.stderr
    assert not workspace.cluster.slurm("squeue", "--noheader").strip()
    note("submit.py: exit code 2, names the key and a similar one; no job")


def test_a_missing_data_folder_is_refused_by_submit(workspace, note):
    done = workspace.try_submit("no-data", sets=("data.sources.0={store: gone}", "model.tokenizer=."))
    assert done.returncode == 2
    assert "data.sources.0.store (gone): not there" in done.stderr
    note("submit.py: exit code 2, names key and path; no job")


def test_data_that_vanished_is_refused_by_the_pre_flight(workspace, note, monkeypatch):
    monkeypatch.chdir(workspace.folder)
    recipe = load_recipe("tiny_base", [f"data.cache_dir={workspace.folder}/vanishing"])
    tokenizer = tokenizer_path(recipe)
    store = prepare_source(recipe.data.sources[0], recipe.data, tokenizer, progress=False)
    run = workspace.submit(
        "vanished",
        "--sbatch=--hold",
        sets=(f"data.sources.0={{store: {store}}}", f"model.tokenizer={tokenizer}"),
    )
    shutil.rmtree(store)
    workspace.cluster.slurm("scontrol", "release", run.job)
    record = assert_refused(run, "data.sources.0.store", "is not there on n1, n2")
    note(f"pre-flight names key, path and both nodes; FAILED {record['ExitCode']}, nothing trained")


def test_a_node_with_another_version_is_refused(workspace, note):
    other = workspace.folder / "other-version" / "deepspeed-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    python = workspace.folder / "python-of-n2"
    python.write_text(
        f'#!/bin/sh\n[ "$(hostname)" = n2 ] && export PYTHONPATH={other.parent}:$PYTHONPATH\nexec {PYTHON} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    run = workspace.submit("versions", "--python", str(python))
    record = assert_refused(run, "version of deepspeed differs", "0.0.1 on n2")
    note(f"pre-flight names package, both versions and nodes; FAILED {record['ExitCode']}, nothing trained")


def test_a_full_disk_is_refused(workspace, note):
    run = workspace.submit(str(workspace.cluster.small_disk / "full"))
    record = assert_refused(run, "GB free", "the next checkpoints need")
    note(f"pre-flight states what is free and what is needed; FAILED {record['ExitCode']}, nothing trained")


def test_a_gpu_job_whose_torch_sees_no_gpu_is_refused(workspace, note):
    run = workspace.submit("blind", gpus=1)
    record = assert_refused(run, "SLURM gave 1 GPUs, torch sees 0", "rank 0 on n1", "rank 1 on n2")
    note(f"pre-flight names rank and node; FAILED {record['ExitCode']}: no silent training on CPUs")
