"""The runs of a sweep, what sweep.json keeps of them, and the folders that hold runs of other recipes."""

from __future__ import annotations

import json

import pytest

from bico_ds.cluster.sweep import (
    SWEEP_FILE,
    is_done,
    list_sweep,
    read_sweep,
    recipe_file,
    refuse_changed,
    write_sweep,
)
from bico_ds.common.errors import UserError
from bico_ds.config.grid import parse_axis
from bico_ds.config.load import dump_recipe, load_recipe

RATE = "objectives.bico.mask.rate"


def sweep(*axes, recipes=("tiny_bico",), overrides=()):
    return list_sweep(recipes, overrides, [parse_axis(axis) for axis in axes])


def trained(folder, run, state="done"):
    """A run folder as training leaves it, as far as a sweep reads it."""
    (folder / run.name).mkdir(parents=True)
    (folder / run.name / "recipe.yaml").write_text(dump_recipe(run.recipe))
    (folder / run.name / "state.json").write_text(json.dumps({"state": state, "step": 3}))


def test_every_recipe_has_a_run_at_every_point_over_the_common_overrides():
    runs = sweep(
        "optimizer.lr=1e-3,2e-3", "seed=1,2", recipes=["tiny_bico", "tiny_ntp"], overrides=["seed=9"]
    )
    expected = [
        f"{recipe}+lr={lr}+seed={seed}"
        for recipe in ("tiny_bico", "tiny_ntp") for lr in ("0.001", "0.002") for seed in (1, 2)
    ]  # fmt: skip
    assert [run.name for run in runs] == expected
    for run in runs:
        values = {"optimizer.lr": run.recipe.optimizer.lr, "seed": run.recipe.seed}
        assert run.values == values
        again = load_recipe(run.recipe.name, [f"{key}={value}" for key, value in values.items()])
        assert again == run.recipe


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["optimizer.lrr=1"], r"--grid optimizer\.lrr=1: .*did you mean 'lr'"),
        ([f"{RATE}=0.1,1.5"], rf"--grid {RATE}=1\.5: objectives\.1\.mask\.rate: must be"),
        (["objectives.bicoo.mask.rate=0.1"], r"--grid objectives\.bicoo\.mask\.rate=0\.1: the list 'objectives' has"),
        (["seed=1,x"], r'--grid seed="x": seed: '),
        (["objectives.0.probability=0.4,0.3"], r"--grid objectives\.0\.probability=0\.4: .*must sum to 1"),
        ([f"{RATE}=0.1,0.2", "objectives.1.mask.rate=0.3"], rf"--grid {RATE}: overwritten by another key of the grid \(obj"),
        ([f"{RATE}=0.1", "objectives.1.mask.rate=0.3"], rf"--grid {RATE}: overwritten by"),
        (["optimizer.lr=1", "optimizer={lr: 0.2}"], r"--grid optimizer\.lr: overwritten by"),
        (["optimizer={lr: 0.2}", "optimizer.lr=1,0.5"], "--grid optimizer: overwritten by"),
        ([f"{RATE}=0.1", "objectives=[{kind: ntp}]"], rf"--grid {RATE}: overwritten by"),
        (["name=a,b"], r"'a\+name=a' and 'b\+name=b' would be the same: their recipes do not differ but in names"),
        (["description=a,b"], "would be the same"),
        (["output_dir=a,b"], "would be the same"),
        (["optimizer.lr=1,1.0"], "would be the same"),
    ],
)  # fmt: skip
def test_a_point_that_is_no_recipe_or_one_that_is_there_already_is_refused(axes, message):
    with pytest.raises(UserError, match=message):
        sweep(*axes)


def test_a_section_and_a_key_that_it_leaves_open_make_one_recipe():
    (run,) = sweep("optimizer={lr: 2e-3, weight_decay: 0}", "optimizer.betas=[0.9, 0.9]")
    assert (run.recipe.optimizer.lr, list(run.recipe.optimizer.betas)) == (2e-3, [0.9, 0.9])


def test_a_recipe_and_its_copy_under_another_name_are_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: tiny_bico\ndescription: mine\n")
    with pytest.raises(UserError, match=r"'tiny_bico\+seed=1' and 'mine\+seed=1' would be the same"):
        sweep("seed=1", recipes=["tiny_bico", str(tmp_path / "mine.yaml")])


def test_two_recipes_of_one_name_have_one_folder_and_are_refused(tmp_path):
    (tmp_path / "tiny_bico.yaml").write_text("extends: tiny_ntp\n")
    with pytest.raises(UserError, match=r"same folder, 'tiny_bico\+seed=1'"):
        sweep("seed=1", recipes=["tiny_bico", str(tmp_path / "tiny_bico.yaml")])


def test_what_is_written_is_read_again_and_runs_of_earlier_commands_stay(tmp_path):
    first, more = sweep("seed=1,2"), sweep("seed=2,3")
    write_sweep(tmp_path / "s", first)
    write_sweep(tmp_path / "s", more)
    names = [f"tiny_bico+seed={seed}" for seed in (1, 2, 3)]
    assert read_sweep(tmp_path / "s") == {
        name: {"recipe": "tiny_bico", "values": {"seed": seed}} for seed, name in enumerate(names, 1)
    }
    for run in (*first, *more):
        assert load_recipe(str(recipe_file(tmp_path / "s", run))) == run.recipe


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"runs": []}', '{"runs": {"a": 1}}', '{"runs": {"a": {"recipe": 1, "values": {}}}}',
                '{"runs": {"a": {"recipe": "b", "values": []}}}', '{"runs"'],
)  # fmt: skip
def test_a_file_that_lists_no_sweep_is_left_as_it_is_and_named(tmp_path, content):
    (tmp_path / SWEEP_FILE).write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: .*; move it away"):
        write_sweep(tmp_path, sweep("seed=1"))
    assert (tmp_path / SWEEP_FILE).read_text() == content
    assert list(tmp_path.iterdir()) == [tmp_path / SWEEP_FILE]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "s").write_text("a file")
    with pytest.raises(UserError, match="--output-dir: cannot write"):
        write_sweep(tmp_path / "s" / "t", sweep("seed=1"))


@pytest.mark.parametrize("state", ["done", "preempted", "failed"])
def test_a_run_of_another_recipe_is_refused_with_what_differs(tmp_path, state):
    before = sweep("seed=1,2")
    for run in before:
        trained(tmp_path, run, state)
    refuse_changed(tmp_path, before)
    refuse_changed(tmp_path, sweep("seed=1,2,3"))
    harmless = ["monitor.csv=true", "distributed.timeout_minutes=5", "description=other", "output_dir=x"]
    refuse_changed(tmp_path, sweep("seed=1,2", overrides=harmless))
    with pytest.raises(
        UserError, match=r"tiny_bico\+seed=1' holds a run of another recipe: optimizer\.lr was 0\.002, and is"
    ):
        refuse_changed(tmp_path, sweep("seed=1", overrides=["optimizer.lr=0.5"]))
    with pytest.raises(
        UserError, match=r"objectives\.bico\.mask\.rate was .*; training\.steps was 700, and is 9 now"
    ):
        refuse_changed(tmp_path, sweep("seed=2", overrides=[f"{RATE}=0.7", "training.steps=9"]))


def test_a_run_of_an_older_program_has_the_defaults_of_keys_that_it_did_not_know(tmp_path):
    (run,) = sweep("seed=1")
    trained(tmp_path, run)
    file = tmp_path / run.name / "recipe.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("share_by:")))
    assert len(lines) > len(file.read_text().splitlines())
    refuse_changed(tmp_path, [run])
    with pytest.raises(UserError, match='share_by was "steps", and is "tokens" now'):
        refuse_changed(tmp_path, sweep("seed=1", overrides=["share_by=tokens"]))


def test_done_is_what_says_so_and_has_its_recipe(tmp_path):
    runs = sweep("seed=1,2,3,4")
    for run, state in zip(runs, ("done", "preempted", "done", "running"), strict=True):
        trained(tmp_path, run, state)
    (tmp_path / runs[2].name / "recipe.yaml").unlink()
    assert [is_done(tmp_path / run.name) for run in runs] == [True, False, False, False]
    assert not is_done(tmp_path / "nowhere")
