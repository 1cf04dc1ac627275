"""Starts that come to nothing, on real ranks; in the folder of a finished run, its record stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bico_ds.checkpoint import manifest
from bico_ds.config.load import load_recipe
from bico_ds.training import assembly
from tests.distributed.launching import end_tree, last_step, metrics, start, train, wait_until
from tests.distributed.survival import RECIPE, SMALL, state

pytestmark = pytest.mark.distributed

SHORT = (
    *SMALL, "training.steps=4", "checkpoint.every_steps=2", "schedule.warmup_steps=1", "schedule.decay_steps=1",
    "monitor.csv=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    done = train(RECIPE, run, *SHORT, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(run)["state"] == "done"
    return run


@pytest.fixture
def found(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def damage_the_sums(checkpoint: Path) -> None:
    """A complete checkpoint that is, once loaded, not what its manifest has."""
    content = json.loads((checkpoint / manifest.MANIFEST).read_text())
    del content["seal"]
    name = next(iter(content["checksums"]["weight"]))
    content["checksums"]["weight"][name] += 1
    manifest.write_manifest(checkpoint, content)


@pytest.mark.parametrize(
    ("where", "overrides", "resume", "message"),
    [
        ("by the choice of a checkpoint", ["model.config.hidden_size=32"], "auto", "was trained with 64"),
        ("by the restored state", ["optimizer.lr=1e-3"], "step-000002", "not as they were saved"),
    ],
)  # fmt: skip
def test_a_start_that_is_refused_leaves_all_as_it_was(found, where, overrides, resume, message):
    damage_the_sums(found / "checkpoints" / "step-000002")
    before = {path: path.read_bytes() for path in found.rglob("*") if path.is_file()}
    resume = str(found / "checkpoints" / resume) if resume.startswith("step") else resume
    done = train(RECIPE, found, *SHORT, *overrides, ranks=1, options=("--resume", resume))
    assert done.returncode in (1, 2) and message in done.stderr, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in found.rglob("*") if path.is_file()} == before


def test_no_rank_trains_on_a_damaged_store_and_one_message_says_why(tmp_path):
    recipe = load_recipe("tiny_base", [f"data.cache_dir={tmp_path}/cache"])
    (store,) = assembly.prepare_stores(recipe, progress=False)
    content = bytearray((store / "tokens.bin").read_bytes())
    content[101] ^= 1
    (store / "tokens.bin").write_bytes(content)
    sources = f"data.sources=[{{store: {store}}}]"
    done = train("tiny_base", tmp_path / "run", sources, f"model.tokenizer={store / 'tokenizer'}", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: token store '{store}' is damaged: wrong checksum of tokens.bin" in done.stderr
    assert state(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_begun_anew_records_itself_and_keeps_the_earlier_ones_record_aside(found):
    before = (found / "recipe.yaml").read_text()
    done = train(RECIPE, found, *SHORT, "optimizer.lr=1e-3", ranks=1, options=("--resume", "none"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (found / "replaced-1" / "recipe.yaml").read_text() == before
    assert yaml.safe_load((found / "recipe.yaml").read_text())["optimizer"]["lr"] == 1e-3
    assert [len(json.loads((found / "run.json").read_text())), state(found)["step"]] == [2, 4]
    for run in (found, found / "replaced-1"):
        assert len((run / "csv" / RECIPE / "loss_all.csv").read_text().splitlines()) == 5


def fill_with_a_link_to_nowhere(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to("/nowhere/mounted")


@pytest.mark.parametrize("lose", [shutil.rmtree, fill_with_a_link_to_nowhere])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_left_as_it_was(found, lose):
    lose(found / "checkpoints")
    before = {path: path.read_bytes() for path in found.rglob("*") if path.is_file()}
    done = train(RECIPE, found, *SHORT, ranks=1)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "step 4 was written there" in done.stderr and "--resume none" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in found.rglob("*") if path.is_file()} == before


def test_checkpoints_that_could_not_be_written_are_refused_before_weights_and_data(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("/nowhere/mounted")
    done = train(RECIPE, tmp_path / "run", *SHORT, "data.cache_dir=stores", ranks=1)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run/checkpoints': it is a link to '/nowhere/mounted', which is not there" in done.stderr
    assert not (tmp_path / "stores").exists()


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_step_0_and_keeps_its_metrics(tmp_path):
    run, endless = tmp_path / "run", (*SHORT, "checkpoint.every_steps=null")
    command = start(RECIPE, run, *endless, "training.steps=5000", ranks=1)
    try:
        wait_until(lambda: last_step(run) >= 3, command)
    finally:
        end_tree(command)
    before = (run / "metrics.jsonl").read_text().splitlines()
    done = train(RECIPE, run, *endless, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no checkpoint yet: training starts from step 0" in done.stdout
    assert (run / "replaced-1" / "metrics.jsonl").read_text().splitlines() == before
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_model_that_no_memory_here_holds_is_refused_before_its_weights(tmp_path, ranks):
    large = ("model.config.hidden_size=65536", "model.config.num_hidden_layers=100", "data.cache_dir=stores")
    done = train(RECIPE, tmp_path / "run", *SHORT, *large, ranks=ranks)
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "the host, swap included, has" in done.stderr and "this run needs at least" in done.stderr
    assert "Traceback" not in done.stderr
    assert state(tmp_path / "run")["state"] == "failed"
    if ranks == 1:
        assert done.returncode == 2
