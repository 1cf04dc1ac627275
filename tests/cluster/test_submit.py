"""The batch script that submit.py writes, and what it refuses before a node is asked for. Needs no SLURM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from bico_ds.cluster.batch_script import COMMON_PART, stop_signal
from bico_ds.cluster.job import Job, Resources, Settings
from bico_ds.cluster.preflight.inputs import missing_inputs
from bico_ds.cluster.submission import preview, write_batch_script
from bico_ds.cluster.sweep import list_sweep, read_sweep
from bico_ds.commands.slurm import submit as command
from bico_ds.common.errors import UserError
from bico_ds.config.grid import parse_axis
from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.config.paths import LocalPath
from bico_ds.config.resources import BATCH_SCRIPT
from tests import ROOT


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny_base")


def a_job(folder, recipe, **changes):
    resources: dict[str, Any] = {"nodes": 2, "gpus_per_node": 8, "ranks_per_node": 8, "time": "24:00:00"}
    names = ("container", "bind", "network_interface", "python", "native_ops")
    settings = {key: changes.pop(key) for key in names if key in changes}
    runs = changes.pop("runs", {folder / "run": recipe})
    max_parallel = changes.pop("max_parallel", None)
    return Job(
        name="tiny", folder=folder / "run" / "slurm", runs=runs, resources=Resources(**resources | changes),
        settings=Settings(**settings), max_parallel=max_parallel,
    )  # fmt: skip


def bash_values(script, *names, **environment):
    """What the script's variables are, by bash itself."""
    head = script.partition(COMMON_PART)[0]
    shown = "\n".join(f'echo "{name}=${name}"' for name in names)
    done = subprocess.run(
        ["bash", "-u", "-c", f"{head}\n{shown}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def sbatch_options(script):
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(line.lstrip("-").partition("=")[::2] for line in lines)


def test_script_asks_for_the_given_resources(tmp_path, recipe):
    script = preview(a_job(tmp_path, recipe, partition="gpu", account="nlp", qos="high", constraint="h100",
                          cpus_per_task=12, more=["--exclusive", "--mem=0"]))  # fmt: skip
    options = sbatch_options(script)
    expected = {
        "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "24:00:00", "partition": "gpu",
        "account": "nlp", "qos": "high", "constraint": "h100", "cpus-per-task": "12", "open-mode": "append",
        "signal": "B:USR1@300", "requeue": "", "exclusive": "", "mem": "0",
    }  # fmt: skip
    assert expected.items() <= options.items()
    assert "array" not in options


@pytest.mark.parametrize("changes", [{}, {"container": "/images/a b.sif"}, {"network_interface": "ib0"}])
def test_script_is_valid_bash(tmp_path, recipe, changes):
    script = preview(a_job(tmp_path, recipe, **changes))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_awkward_paths_survive_the_shell(tmp_path, recipe):
    run = tmp_path / "it's a $HOME `run`"
    bind = [LocalPath("/data/x y")]
    job = a_job(tmp_path, recipe, runs={run: recipe}, container="/images/a b.sif", bind=bind)
    values = bash_values(preview(job), "RUN", "RECIPE", "CONTAINER", "BIND")
    assert values["RUN"] == str(run)
    assert values["RECIPE"] == f"{run}/slurm/recipe.yaml"
    assert values["CONTAINER"] == "/images/a b.sif"
    assert "/data/x y" in values["BIND"].split(",")
    assert str(run) in values["BIND"].split(",")


def test_paths_of_the_nodes_are_expanded_there_and_not_on_the_login_node(tmp_path, recipe, monkeypatch):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    there = {key: LocalPath(f"${{SLURM_TMPDIR}}/{key} 1") for key in ("python", "native_ops")}
    script = preview(a_job(tmp_path, recipe, **there, bind=[LocalPath("$SLURM_TMPDIR/b")]))
    values = bash_values(script, "PYTHON", "TORCH_EXTENSIONS_DIR", "BIND", SLURM_TMPDIR="/local/job 7")
    assert values["PYTHON"] == "/local/job 7/python 1"
    assert values["TORCH_EXTENSIONS_DIR"] == "/local/job 7/native_ops 1"
    assert values["BIND"].split(",")[-1] == "/local/job 7/b"


def test_each_element_of_an_array_has_its_own_run(tmp_path, recipe):
    runs = {tmp_path / f"r{n}": recipe for n in range(4)}
    script = preview(a_job(tmp_path, recipe, runs=runs, max_parallel=2))
    assert sbatch_options(script)["array"] == "0-3%2"
    found = [bash_values(script, "RUN", SLURM_ARRAY_TASK_ID=str(n))["RUN"] for n in range(4)]
    assert found == [str(run) for run in runs]


def test_generated_scripts_differ_from_the_plain_one_in_their_first_part_only(tmp_path, recipe):
    plain = BATCH_SCRIPT.read_text().partition(COMMON_PART)[2]
    assert preview(a_job(tmp_path, recipe)).partition(COMMON_PART)[2] == plain


def test_written_recipe_is_resolved_and_earlier_scripts_stay(tmp_path):
    recipe = load_recipe("tiny_bico", ["seed=7"])
    first, second = (write_batch_script(a_job(tmp_path, recipe)) for _ in range(2))
    assert first != second
    assert first.exists()
    written = tmp_path / "run" / "slurm" / "recipe.yaml"
    assert "extends" not in yaml.safe_load(written.read_text())
    assert load_recipe(str(written)) == recipe


def test_stop_signal_is_one_that_the_recipe_handles(recipe):
    assert stop_signal(load_recipe("tiny_base", ["distributed.preempt_signals=[SIGTERM,SIGUSR2]"])) == "USR2"
    with pytest.raises(UserError, match=r"distributed\.preempt_signals"):
        stop_signal(load_recipe("tiny_base", ["distributed.preempt_signals=[SIGTERM]"]))


@pytest.mark.parametrize("time_limit", ["30", "1:30", "24:00:00", "2-12", "2-12:30:00"])
def test_slurm_times_are_taken(tmp_path, recipe, time_limit):
    assert (
        sbatch_options(preview(a_job(tmp_path, recipe, time=time_limit, signal_seconds=60)))["time"]
        == time_limit
    )


@pytest.mark.parametrize("time_limit", ["24h", "1 day", "", "12:0"])
def test_other_times_are_refused(time_limit):
    with pytest.raises(UserError, match="--time"):
        Resources(nodes=1, gpus_per_node=1, ranks_per_node=1, time=time_limit)


def test_missing_data_is_named_by_its_key(tmp_path):
    recipe = load_recipe("tiny_base", [f"data.sources.0={{store: {tmp_path}/nowhere}}"])
    (problem,) = missing_inputs(recipe)
    assert re.match(r"data\.sources\.0\.store .*nowhere", problem)


@pytest.mark.parametrize("value", ["{store: '${NO_SUCH_PLACE}/a'}", "{files: ['${NO_SUCH_PLACE}/a.txt']}"])
def test_a_variable_that_is_not_set_is_named_with_its_key(monkeypatch, value):
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    recipe = load_recipe("tiny_base", [f"data.sources.0={value}"])
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.(store|files\.0): .*variable NO_SUCH_PLACE is not set"
    ):
        list(missing_inputs(recipe))


def run_command(monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    base = ["--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1", "--time", "10"]
    return command.main([*base, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tiny_bse"], "did you mean 'tiny_base'"),
        (["--recipe", "tiny_base", "--set", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["--recipe", "tiny_base", "--nodes", "3"], "training.global_batch_bins (4) must be a multiple"),
        (["--recipe", "tiny_base", "--set", "distributed.world_size=4"], "made for 4 ranks, started with 1"),
        (["--recipe", "tiny_base", "--set", "model.path=./none"], "model.path (./none): not there"),
        (["--recipe", "llama70b_bico"], "model.path (models/llama-3.1-70b): not there; fetch it there"),
        (["--recipe", "tiny_base", "--time", "soon"], "--time 'soon'"),
        (["--recipe", "tiny_base", "tiny_base"], "same folder"),
        (["--recipe", "tiny_base", "--container", "no.sif"], "--container: 'no.sif' is not there"),
        (["--recipe", "tiny_base", "--set", "training.steps=20"], "warmup_steps"),
    ],
)
def test_mistakes_are_refused_with_exit_code_2(monkeypatch, tmp_path, capsys, arguments, message):
    assert run_command(monkeypatch, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("0-00:00:07", 7),
    ],
)
def test_the_warning_comes_before_the_time_limit(time_limit, seconds):
    def ask(warning):
        Resources(nodes=1, gpus_per_node=1, ranks_per_node=1, time=time_limit, signal_seconds=warning)

    ask(seconds - 1)
    with pytest.raises(UserError, match="--signal-seconds"):
        ask(seconds)


def test_no_time_limit_is_never_too_short():
    Resources(nodes=1, gpus_per_node=1, ranks_per_node=1, time="0")


@pytest.mark.parametrize(
    "option", [("--gpus-per-node", "-1"), ("--max-requeues", "-1"), ("--signal-seconds", "0")]
)
def test_numbers_that_mean_nothing_are_refused(monkeypatch, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", *option)
    assert ended.value.code == 2
    assert f"argument {option[0]}: must be at least" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in ("/proc/x", str(tmp_path / "file"), str(tmp_path / "file" / "run")):
        assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", "--output-dir", folder) == 2
        assert "error: --output-dir: cannot" in capsys.readouterr().err


def test_hpz_is_checked_with_the_ranks_per_node_that_were_asked_for(monkeypatch, tmp_path):
    """12 ranks fill 3 nodes of 4, and do not fill nodes of 8."""
    recipe = load_recipe("tiny_base", ["deepspeed.config=zero3_hpz", "training.global_batch_bins=24"])
    command.check(tmp_path, recipe, Resources(nodes=3, gpus_per_node=0, ranks_per_node=4, time="10:00:00"))


def test_the_stop_command_saves_however_long_it_takes(tmp_path, recipe):
    run = tmp_path / "a run"
    stop = command.stop_command("7", a_job(tmp_path, recipe, runs={run: recipe}))
    assert stop == f"touch '{run}/stop' && scancel --signal=USR1 --batch 7"
    array = a_job(tmp_path, recipe, runs={tmp_path / "a": recipe, tmp_path / "b": recipe})
    stop = command.stop_command("7", array)
    assert stop.startswith(f"scancel --state=PENDING 7; touch {tmp_path}/a/stop {tmp_path}/b/stop && ")


def test_dry_run_prints_the_script_and_writes_nothing(monkeypatch, tmp_path, capsys):
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny_base\n")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_weights_data_and_container_prints_the_script_and_what_is_missing(
    monkeypatch, tmp_path, capsys
):
    data = ["--set", "data.sources.0={store: nowhere}"]
    words = [
        "--recipe",
        "llama70b_bico",
        "--nodes",
        "8",
        "--gpus-per-node",
        "8",
        "--ranks-per-node",
        "8",
        *data,
    ]
    words += ["--container", "none.sif"]
    assert run_command(monkeypatch, tmp_path, *words, "--dry-run") == 0
    script, notes = capsys.readouterr()
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=llama70b_bico\n")
    lines = [line for line in notes.splitlines() if not line.startswith(("plan: ", "warning: "))]
    assert all(line.startswith("note: submitting would be refused: ") for line in lines)
    missing = [
        "model.path (models/llama-3.1-70b)",
        "data.sources.0.store (nowhere)",
        "--container: 'none.sif'",
    ]
    assert [name for name in missing if any(name in line for line in lines)] == missing
    assert list(tmp_path.iterdir()) == []
    assert run_command(monkeypatch, tmp_path, *words) == 2
    assert "error: model.path (models/llama-3.1-70b): not there" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["models/nowhere", "owner/no-such-model", "${NO_SUCH_FOLDER}/model"])
def test_a_dry_run_of_a_recipe_that_does_not_say_what_its_model_is_checks_the_rest(
    monkeypatch, tmp_path, capsys, path
):
    monkeypatch.setenv("NO_SUCH_FOLDER", str(tmp_path / "none"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"extends: llama3_8b_bico\nmodel: {{path: '{path}', config: null, tokenizer: nowhere/at-all}}\n"
        "data: {sources: [{files: [none/*.jsonl]}]}\n"
    )
    words = ["--recipe", str(recipe), "--gpus-per-node", "8", "--ranks-per-node", "8", "--dry-run"]
    assert run_command(monkeypatch, tmp_path, *words) == 0
    script, notes = capsys.readouterr()
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=mine\n")
    assert "note: what depends on the model was not checked: model.path: " in notes
    assert notes.splitlines()[-1].startswith("plan: none: model.path: ")
    assert run_command(monkeypatch, tmp_path, *words, "--set", "distributed.world_size=3") == 2
    assert "distributed.world_size: this recipe is made for 3 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--sbatch=--export=ALL,HF_TOKEN=abc123"],
        ["--container", "docker://me:abc123@host/image"],
        ["--set", "output_dir=https://me:abc123@host/x"],
        ["--set", "deepspeed.overrides.hub.api_key=abc123"],
    ],
)
def test_a_job_with_a_secret_is_refused_before_anything_is_written(monkeypatch, tmp_path, capsys, words):
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", *words) == 2
    shown, error = capsys.readouterr()
    assert "the environment" in error and "sbatch hands to the job" in error
    assert "abc123" not in shown + error
    assert list(tmp_path.iterdir()) == []


def test_the_planner_s_verdict_for_the_nodes_asked_for_comes_last(monkeypatch, tmp_path, capsys):
    words = [
        "--recipe",
        "llama70b_bico_lora",
        "--nodes",
        "1",
        "--gpus-per-node",
        "8",
        "--ranks-per-node",
        "8",
    ]
    assert run_command(monkeypatch, tmp_path, *words, "--dry-run") == 0
    script, notes = capsys.readouterr()
    assert "plan: " not in script
    verdict = next(line for line in notes.splitlines() if line.startswith("plan: "))
    assert verdict.startswith("plan: llama70b_bico_lora on 1 node of 8 x NVIDIA H100 SXM, 80 GB ")
    assert " steps of " in verdict
    words += ["--dry-run", "--set"]
    assert run_command(monkeypatch, tmp_path, *words, "distributed.gpu=null") == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("plan: none, as no GPU is named")
    assert run_command(monkeypatch, tmp_path, *words, "distributed.gpu=h100-80") == 2
    assert "did you mean 'h100-80g'" in capsys.readouterr().err


def an_sbatch(monkeypatch, folder):
    """A SLURM that takes every script."""
    (folder / "bin").mkdir()
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 7\n", encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")


def test_a_grid_makes_an_array_of_the_runs_and_folders_of_a_sweep(monkeypatch, tmp_path):
    an_sbatch(monkeypatch, tmp_path)
    grid = ["--grid", "objectives.bico.mask.rate=0.15,0.3", "--grid", "seed=1,2"]
    words = ["--recipe", "tiny_bico", "--set", "model.path=null", *grid]
    assert run_command(monkeypatch, tmp_path, *words) == 0
    folder = tmp_path / "runs" / "sweep-tiny_bico"
    runs = list_sweep(["tiny_bico"], ["model.path=null"], [parse_axis(axis) for axis in grid[1::2]])
    script = (folder / "slurm" / "job-1.sbatch").read_text()
    assert sbatch_options(script)["array"] == "0-3"
    for number, run in enumerate(runs):
        value = bash_values(script, "RUN", SLURM_ARRAY_TASK_ID=str(number))["RUN"]
        assert value == str(folder / run.name)
        assert load_recipe(f"{value}/slurm/recipe.yaml") == run.recipe
    assert list(read_sweep(folder)) == [run.name for run in runs]


def test_runs_of_a_grid_that_are_done_are_left_out_and_those_of_other_recipes_refused(
    monkeypatch, tmp_path, capsys
):
    words = ["--recipe", "tiny_base", "--grid", "seed=1,2", "--output-dir", "s", "--dry-run"]
    for seed in (1, 2):
        run = tmp_path / "s" / f"tiny_base+seed={seed}"
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny_base", [f"seed={seed}"])))
        (run / "state.json").write_text(json.dumps({"state": "done", "step": 300}))
        if seed == 1:
            assert run_command(monkeypatch, tmp_path, *words) == 0
            script, notes = capsys.readouterr()
            assert f"RUN={tmp_path}/s/tiny_base+seed=2\n" in script
            assert "note: 1 of 2 runs are done already, and left out" in notes
    assert run_command(monkeypatch, tmp_path, *words) == 2
    assert "all 2 runs in" in capsys.readouterr().err
    assert run_command(monkeypatch, tmp_path, *words, "--set", "optimizer.lr=0.5") == 2
    assert "holds a run of another recipe: optimizer.lr was" in capsys.readouterr().err


def test_seeds_beside_a_grid_are_refused_with_what_to_write(monkeypatch, tmp_path, capsys):
    words = ["--recipe", "tiny_base", "--grid", "optimizer.lr=1e-3,2e-3", "--seeds", "1", "2"]
    assert run_command(monkeypatch, tmp_path, *words) == 2
    assert "--grid seed=1,2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_each_plan_of_a_grid_is_told_with_its_runs_and_seeds_make_none_of_their_own(
    monkeypatch, tmp_path, capsys
):
    words = ["--recipe", "llama70b_bico_lora", "--nodes", "1", "--gpus-per-node", "8", "--ranks-per-node", "8",
             "--grid", "seed=1,2", "--dry-run"]  # fmt: skip
    assert run_command(monkeypatch, tmp_path, *words) == 0
    notes = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("plan: ") for line in notes) == 1
    assert not [line for line in notes if line.startswith("of ")]
    assert run_command(monkeypatch, tmp_path, *words, "--grid", "training.micro_batch_bins=1,2") == 0
    notes = capsys.readouterr().err.splitlines()
    name = "llama70b_bico_lora+seed={}+micro_batch_bins={}"
    assert [line for line in notes if line.startswith("of ")] == [
        f"of {name.format(1, bins)}, {name.format(2, bins)}:" for bins in (1, 2)
    ]
    assert len({line for line in notes if line.startswith("plan: ")}) == 2


def test_a_submitted_run_on_cpus_says_that_its_memory_is_checked_at_the_start(monkeypatch, tmp_path, capsys):
    an_sbatch(monkeypatch, tmp_path)
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "plan: trains on CPUs; whether the nodes' memory is enough is checked at the start"


def test_a_dry_run_refuses_what_needs_no_weights_to_be_known(monkeypatch, tmp_path, capsys):
    words = ["--recipe", "llama70b_bico", "--gpus-per-node", "8", "--ranks-per-node", "8", "--dry-run"]
    assert run_command(monkeypatch, tmp_path, *words, "--set", "distributed.world_size=4") == 2
    assert "made for 4 ranks, started with 8" in capsys.readouterr().err
    words += ["--set", "distributed.world_size=8", "--set", "model.config.hidden_sise=1"]
    assert run_command(monkeypatch, tmp_path, *words) == 2
    assert "hidden_sise" in capsys.readouterr().err


def test_the_job_inherits_nothing_that_would_keep_its_ranks_on_the_cpu(monkeypatch, tmp_path):
    inherited = tmp_path / "inherited"
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nenv > "{inherited}"\necho 7\n', encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", "--nodes", "1") == 0
    names = {line.split("=")[0] for line in inherited.read_text(encoding="utf-8").splitlines()}
    assert not names & {"DS_ACCELERATOR", "LOCAL_WORLD_SIZE"}


def test_without_sbatch_the_script_is_ready_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "no-commands-here"))
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base") == 2
    assert "no `sbatch` on this machine" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny_base" / "slurm" / "job-1.sbatch").is_file()


def test_a_script_takes_no_number_that_another_has_and_passes_over_other_names(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "no-commands-here"))
    slurm = tmp_path / "runs" / "tiny_base" / "slurm"
    slurm.mkdir(parents=True)
    for name in ("job-2.sbatch", "job-x.sbatch", "job-9.sbatch.bak", "job-02.sbatch"):
        (slurm / name).write_text("mine")
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base") == 2
    assert (slurm / "job-2.sbatch").read_text() == "mine"
    assert (slurm / "job-3.sbatch").is_file()


def test_a_folder_that_is_being_trained_into_is_refused(monkeypatch, tmp_path, capsys):
    run = tmp_path / "busy"
    run.mkdir()
    lock = {"run_id": "abc", "host": "n7", "pid": 1, "job": "42", "heartbeat": time.time()}
    (run / "lock.json").write_text(json.dumps(lock))
    assert run_command(monkeypatch, tmp_path, "--recipe", "tiny_base", "--output-dir", str(run)) == 2
    assert "in use by job 42 on n7" in capsys.readouterr().err


def test_light_commands_import_no_torch():
    for name in ("status", "attempt", "submit"):
        heavy = "[m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules]"
        code = f"import sys, bico_ds.commands.slurm.{name}; print({heavy})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]", name
