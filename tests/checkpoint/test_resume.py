"""Which checkpoint a run goes on from, and when it refuses to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bico_ds.checkpoint import manifest
from bico_ds.checkpoint.resume import Resumption, choose, set_aside
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe, recorded_values
from bico_ds.runtime.run_folder import RunFolder

RECIPE = load_recipe("tiny_base", [])
LAYOUT = {
    "ranks": 2, "zero_stage": 3, "dtype": "fp32", "offload_optimizer": "none", "offload_param": "none",
    "sub_group_size": None,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 30):
        checkpoint(folder.checkpoints / f"step-{step:06d}", step)
    return folder


def checkpoint(path: Path, step: int, recipe: dict[str, Any] | None = None) -> None:
    path.mkdir(parents=True)
    (path / "state.pt").write_bytes(bytes(100))
    content: dict[str, Any] = {
        "step": step,
        "layout": LAYOUT,
        "recipe": recipe or RECIPE.model_dump(mode="json"),
    }
    manifest.write_manifest(path, {**content, "files": manifest.file_table(path, [path / "state.pt"])})


def taken(folder: RunFolder, option: str) -> Resumption | None:
    """What is chosen, once the start has taken the folder over."""
    chosen = choose(folder, option, RECIPE, LAYOUT)
    set_aside(folder, option, chosen)
    return chosen


def steps_in(folder: RunFolder) -> list[int]:
    return [manifest.step_of(path) for path in manifest.checkpoints_in(folder.checkpoints)]


def test_auto_takes_the_newest_and_says_so(folder, capsys):
    found = choose(folder, "auto", RECIPE, LAYOUT)
    assert found is not None
    assert (found.step, found.is_universal, found.folder) == (30, False, folder.checkpoints / "step-000030")
    assert "step 30, the newest complete checkpoint, written by 2 ranks" in capsys.readouterr().out


def test_none_starts_anew_and_keeps_the_old_ones(folder):
    assert taken(folder, "none") is None
    assert steps_in(folder) == []
    assert len(list((folder.path / "replaced-1" / "checkpoints").iterdir())) == 3


def test_going_back_sets_the_later_course_aside(folder, capsys):
    found = taken(folder, str(folder.checkpoints / "step-000010"))
    assert found is not None
    assert found.step == 10
    assert steps_in(folder) == [10]
    assert (folder.path / "replaced-1" / "step-000030").is_dir()
    printed = capsys.readouterr().out
    assert "set aside" in printed and "step 10, as asked, written by 2 ranks" in printed


@pytest.mark.parametrize(("option", "step"), [("auto", 30), ("step-000010", 10)])
def test_evaluations_after_the_checkpoint_do_not_stand_for_those_that_are_still_owed(folder, option, step):
    results = [folder.path / "evaluation" / f"step-{n:06d}.json" for n in (10, 20, 30, 40)]
    results[0].parent.mkdir()
    for path in results:
        path.write_text(path.name)
    taken(folder, option if option == "auto" else str(folder.checkpoints / option))
    kept, gone = (
        [p for n, p in zip((10, 20, 30, 40), results, strict=True) if (n <= step) is k] for k in (True, False)
    )
    assert sorted((folder.path / "evaluation").iterdir()) == kept
    for path in gone:
        assert (folder.path / "replaced-1" / "evaluation" / path.name).read_text() == path.name


def test_a_resume_without_a_later_course_sets_nothing_aside(folder):
    taken(folder, "auto")
    assert not list(folder.path.glob("replaced-*"))


def test_damaged_ones_are_set_aside_so_that_they_cannot_push_out_whole_ones(folder):
    (folder.checkpoints / "step-000030" / "state.pt").unlink()
    found = taken(folder, "auto")
    assert found is not None
    assert found.step == 20
    assert steps_in(folder) == [10, 20]


@pytest.mark.parametrize("option", ["none", "auto", "step-000010"])
def test_a_choice_alone_moves_nothing_for_the_start_may_still_be_refused(folder, option):
    (folder.checkpoints / "step-000030" / "state.pt").unlink()
    before = sorted(folder.path.rglob("*"))
    option = str(folder.checkpoints / option) if option.startswith("step") else option
    choose(folder, option, RECIPE, LAYOUT)
    assert sorted(folder.path.rglob("*")) == before


def test_another_runs_checkpoint_is_taken_by_its_folder_and_left_as_it_is(folder, tmp_path):
    mine = RunFolder(tmp_path / "mine")
    mine.path.mkdir()
    found = taken(mine, str(folder.path))
    assert found is not None
    assert found.folder == folder.checkpoints / "step-000030"
    assert steps_in(folder) == [10, 20, 30]


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        (
            ["model.config.hidden_size=64"],
            {},
            "model.config.hidden_size: .* was trained with 128, the recipe has 64",
        ),
        ([], {"zero_stage": 2}, "ZeRO stage 3, the recipe has 2; DeepSpeed cannot change the stage"),
        ([], {"offload_optimizer": "nvme"}, "cannot convert a state that is offloaded to NVMe"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_anything_is_loaded(folder, overrides, layout, message):
    with pytest.raises(UserError, match=message):
        choose(folder, "auto", load_recipe("tiny_base", overrides), {**LAYOUT, **layout})


def test_changed_keys_are_said(folder, capsys):
    choose(folder, "auto", load_recipe("tiny_base", ["optimizer.lr=1e-3"]), LAYOUT)
    assert "changed since the checkpoint: optimizer.lr 0.002 -> 0.001" in capsys.readouterr().out


def test_a_secret_that_the_checkpoint_left_out_is_no_change_and_is_not_said(folder, capsys):
    secret = "deepspeed.overrides.hub={api_key: abc123, rate: 1}"
    recipe = load_recipe("tiny_base", [secret])
    checkpoint(folder.checkpoints / "step-000040", 40, recorded_values(recipe))
    checkpoint(
        folder.checkpoints / "step-000050", 50, recipe.model_dump(mode="json")
    )  # of an earlier version
    for step in ("step-000040", "step-000050"):
        choose(folder, str(folder.checkpoints / step), recipe, LAYOUT)
        other = load_recipe("tiny_base", [secret.replace("abc123", "xyz789").replace("1}", "2}")])
        choose(folder, str(folder.checkpoints / step), other, LAYOUT)
        said = capsys.readouterr().out
        assert said.count("changed since the checkpoint: ") == 1
        assert "deepspeed.overrides.hub.rate 1 -> 2" in said
        assert "abc123" not in said and "xyz789" not in said


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_path_without_a_checkpoint_is_the_users_mistake(folder, tmp_path, path):
    with pytest.raises(UserError, match="no such folder|not a checkpoint of this program"):
        choose(folder, str(tmp_path / path), RECIPE, LAYOUT)
