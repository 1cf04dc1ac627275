"""`bico-ds sweep`: what it starts, passes over, tries again and refuses, with a launcher that is a program of the test."""

from __future__ import annotations

import json
import sys
import time

import pytest

from bico_ds.cluster.sweep import read_sweep
from bico_ds.commands import sweep as command
from bico_ds.config.load import load_recipe

SHORT = ["--set", "model.path=null", "--set", "evaluation.tasks=[]", "--set", "evaluation.every_steps=null"]
WORDS = ["--recipe", "tiny_bico", *SHORT]
LAUNCHER = """#!{python}
# Stands for DeepSpeed's launcher and its ranks: trains nothing, and notes what it was told.
import json, os, pathlib, sys
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--output-dir") + 1])
recipe = pathlib.Path(words[words.index("--recipe") + 1])
with open({notes!r}, "a") as notes:
    notes.write(json.dumps([run.name, words, os.environ.get("OMP_NUM_THREADS")]) + "\\n")
(run / "recipe.yaml").write_bytes(recipe.read_bytes())
fails = run.name in os.environ.get("FAILING", "").split()
state = {{"state": "failed" if fails else "done", "step": 2, "run_id": "r", "reason": "no luck" * fails}}
(run / "state.json").write_text(json.dumps(state))
print("error: no luck" if fails else "well")
sys.exit(int(fails))
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The runs that were started since it was called last: name, words of the launcher, threads."""
    launcher, notes = tmp_path / "bin" / "deepspeed", tmp_path / "notes"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(python=sys.executable, notes=str(notes)))
    launcher.chmod(0o755)
    monkeypatch.setattr(command, "deepspeed_launcher", lambda: str(launcher))
    monkeypatch.setattr(command, "usable_cores", lambda: 8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def since_last():
        found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        notes.write_text("")
        return found

    return since_last


def test_every_point_is_trained_in_its_folder_with_its_recipe_and_compare_comes_last(
    started, tmp_path, capsys
):
    grid = ["--grid", "objectives.bico.mask.rate=0.15,0.3", "--grid", "seed=1,2"]
    assert command.main([*WORDS, *grid, "--jobs", "2", "--ranks", "2"]) == 0
    found = started()
    names = [f"tiny_bico+rate={rate}+seed={seed}" for rate in (0.15, 0.3) for seed in (1, 2)]
    assert sorted(name for name, _, _ in found) == names
    ports = set()
    for name, words, threads in found:
        assert words[:2] == ["--num_accelerators", "2"] and threads == "2"  # 8 cores, 2 runs of 2 ranks
        ports.add(words[words.index("--master_port") + 1])
        recipe = load_recipe(f"runs/sweep-tiny_bico/{name}/recipe.yaml")
        assert name == f"tiny_bico+rate={recipe.objectives[1].mask.rate}+seed={recipe.seed}"
        assert recipe.model.path is None and recipe.name == "tiny_bico"
    assert len(ports) == 4
    assert list(read_sweep(tmp_path / "work" / "runs" / "sweep-tiny_bico")) == names
    *_, counts, last = capsys.readouterr().out.splitlines()
    assert counts.startswith("4 of 4 runs are done; 4 in ")
    assert last.startswith("compare them: ") and last.endswith("compare.py runs/sweep-tiny_bico")


def test_the_same_command_passes_over_what_is_done_and_tries_again_what_failed(
    started, tmp_path, monkeypatch, capsys
):
    words = [*WORDS, "--output-dir", "s", "--grid", "seed=1,2,3"]
    monkeypatch.setenv("FAILING", "tiny_bico+seed=2")
    assert command.main(words) == 1
    assert len(started()) == 3, "the others go on"
    out, errors = capsys.readouterr()
    assert out.splitlines()[-2].startswith("2 of 3 runs are done; 2 in ")
    listed = errors[errors.index("1 failed; the same command tries again") :].splitlines()
    assert listed[1:] == ["  tiny_bico+seed=2: error: no luck", "    s/tiny_bico+seed=2/logs/launch-1.log"]
    monkeypatch.delenv("FAILING")
    assert command.main(words) == 0
    assert [name for name, _, _ in started()] == ["tiny_bico+seed=2"]
    assert "3 runs in s: 2 done, 1 to go on with" in capsys.readouterr().out
    assert command.main(words) == 0
    assert started() == []
    assert command.main([*words, "--grid", "optimizer.lr=2e-3,1e-3"]) == 0, "other names, beside these"
    assert len(started()) == 6
    assert command.main([*words[:-1], "seed=4,3,1"]) == 0
    assert [name for name, _, _ in started()] == ["tiny_bico+seed=4"]
    assert len(read_sweep(tmp_path / "work" / "s")) == 10


def test_what_is_edited_in_a_recipe_meanwhile_does_not_reach_runs_that_wait(started, tmp_path):
    """The launcher of the first run would change the recipe of the second."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: tiny_bico\nmodel: {path: null}\nevaluation: {tasks: [], every_steps: null}\n")
    launcher = tmp_path / "bin" / "deepspeed"
    text = launcher.read_text().replace(
        "print(", f"open({str(mine)!r}, 'a').write('optimizer: {{lr: 9}}\\n')\nprint("
    )
    launcher.write_text(text)
    assert command.main(["--recipe", str(mine), "--grid", "seed=1,2", "--output-dir", "s"]) == 0
    assert {load_recipe(f"s/mine+seed={seed}/recipe.yaml").optimizer.lr for seed in (1, 2)} == {0.002}


def test_a_run_that_waits_is_not_begun_with_the_recipe_of_another_sweep_in_the_folder(
    started, tmp_path, capsys
):
    """The launcher of the first run stands for a command that begins while it trains."""
    launcher = tmp_path / "bin" / "deepspeed"
    other = "pathlib.Path('s/recipes/tiny_bico+seed=2.yaml').write_text(recipe.read_text())\n"
    launcher.write_text(launcher.read_text().replace("print(", f"{other}print("))
    assert command.main([*WORDS, "--grid", "seed=1,2,3", "--output-dir", "s"]) == 1
    assert [name for name, _, _ in started()] == ["tiny_bico+seed=1", "tiny_bico+seed=3"]
    error = capsys.readouterr().err
    assert "tiny_bico+seed=2.yaml' is no longer the recipe that this sweep has for it" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "optimizer.lr=1e-3,fast"], '--grid optimizer.lr="fast": optimizer.lr: '),
        (["--grid", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["--grid", "training.steps=700,3"], "tiny_bico+steps=3: schedule: "),
        (["--grid", "training.global_batch_bins=4,6", "--ranks", "2"], "tiny_bico+global_batch_bins=6: training.global"),
        (["--grid", "seed=1", "--set", "distributed.world_size=4", "--ranks", "2"], "made for 4 ranks, started with 2"),
        (["--grid", "seed=1", "--set", "model.path=nowhere/at/all"], "model.path (nowhere/at/all): not there"),
        (["--grid", "seed=1", "--set", "deepspeed.overrides.hub.api_key=abc123"], "a secret, and the recipes that a sweep"),
    ],
)  # fmt: skip
def test_a_mistake_in_any_point_is_refused_before_the_first_run(started, tmp_path, capsys, words, message):
    assert command.main([*WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "abc123" not in error
    assert started() == [] and list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("words", [[], ["--grid", "seed"], ["--grid", "seed=1", "--jobs", "0"]])
def test_wrong_usage_is_told_as_such(started, words):
    with pytest.raises(SystemExit) as ended:
        command.main([*WORDS, *words])
    assert ended.value.code == 2


def test_a_changed_recipe_is_refused_in_the_folder_of_the_old_one(started, capsys):
    words = [*WORDS, "--grid", "seed=1,2", "--output-dir", "s"]
    assert command.main(words) == 0
    started()
    assert command.main([*words, "--set", "optimizer.lr=0.5"]) == 2
    assert "holds a run of another recipe: optimizer.lr was 0.002, and is 0.5 now" in capsys.readouterr().err
    assert started() == []


def test_the_number_of_ranks_is_the_one_that_the_recipe_is_made_for(started):
    made_for = ["--set", "distributed.world_size=4", "--set", "training.global_batch_bins=8"]
    assert command.main([*WORDS, *made_for, "--grid", "seed=1"]) == 0
    ((_, words, threads),) = started()
    assert words[:2] == ["--num_accelerators", "4"] and threads == "2"


def test_a_dry_run_lists_the_runs_and_writes_nothing(started, tmp_path, capsys):
    """And needs no weights: what is missing is a note."""
    words = [
        "--recipe",
        "llama70b_bico",
        "--set",
        "distributed.world_size=8",
        "--grid",
        "seed=1,2",
        "--dry-run",
    ]
    assert command.main(words) == 0
    out, notes = capsys.readouterr()
    assert out.splitlines()[0] == "2 runs in runs/sweep-llama70b_bico: 2 new"
    assert [line for line in out.splitlines() if line.startswith("  ")] == [
        f"  llama70b_bico+seed={seed}  new" for seed in (1, 2)
    ]
    assert "note: training would be refused: model.path (models/llama-3.1-70b): not there" in notes
    assert started() == [] and list((tmp_path / "work").iterdir()) == []


def test_a_folder_in_which_a_run_is_alive_is_refused(started, tmp_path, capsys):
    run = tmp_path / "work" / "s" / "tiny_bico+seed=2"
    run.mkdir(parents=True)
    lock = {"run_id": "abc", "host": "n7", "pid": 1, "job": "42", "heartbeat": time.time()}
    (run / "lock.json").write_text(json.dumps(lock))
    assert command.main([*WORDS, "--grid", "seed=1,2", "--output-dir", "s"]) == 2
    assert "in use by job 42 on n7" in capsys.readouterr().err
    assert started() == []
