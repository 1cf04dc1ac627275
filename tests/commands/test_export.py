"""The export of a checkpoint whose data are not on this machine: by the run's own tokenizer, or a named one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from bico_ds.checkpoint import best, manifest
from bico_ds.checkpoint.best import BestCheckpoint
from bico_ds.commands import export as export_hf
from bico_ds.config.sections.model import LoraSpec
from bico_ds.runtime.run_folder import RunFolder
from tests import EARLIER_RUN


@pytest.fixture
def gone(tmp_path, monkeypatch) -> Path:
    """A run whose data were in a place that a variable named."""
    shutil.copytree(EARLIER_RUN / "run", tmp_path / "run")
    monkeypatch.delenv("GONE", raising=False)
    rewrite(tmp_path / "run", "data", sources=[{"store": "${GONE}/store"}])
    return tmp_path / "run"


def rewrite(run: Path, section: str, **values: object) -> None:
    """Other values in the recipe that the checkpoint recorded, under a new seal."""
    (checkpoint,) = manifest.checkpoints_in(run / "checkpoints")
    content = json.loads((checkpoint / manifest.MANIFEST).read_text())
    del content["seal"]
    content["recipe"][section] |= values
    manifest.write_manifest(checkpoint, content)


def exported(run: Path, monkeypatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, (run, run.parent / "out", *options))])
    return export_hf.main()


def without_bos(folder: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer without a BOS token, saved in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(EARLIER_RUN / "store" / "tokenizer")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_in_the_run_folder_serves_without_the_data(gone, monkeypatch):
    shutil.copytree(EARLIER_RUN / "store" / "tokenizer", gone / "tokenizer")
    assert exported(gone, monkeypatch) == 0
    assert (gone.parent / "out" / "tokenizer.json").is_file()


def test_without_it_the_variable_is_named_and_the_option_that_helps(gone, monkeypatch, capsys):
    assert exported(gone, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "data.sources.0.store: '${GONE}/store': the environment variable GONE is not set" in shown
    assert shown.endswith("(here: --tokenizer)\n") and shown.count("\n") == 1
    assert exported(gone, monkeypatch, "--tokenizer", EARLIER_RUN / "store" / "tokenizer") == 0


def test_a_base_that_cannot_be_told_is_named_with_its_option(gone, monkeypatch, capsys):
    rewrite(gone, "model", path="${GONE}/base", lora=LoraSpec().model_dump(mode="json"))
    assert exported(gone, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "model.path: '${GONE}/base': the environment variable GONE is not set" in shown
    assert shown.endswith("(here: --base)\n")


def test_a_checkpoint_that_was_copied_elsewhere_takes_no_tokenizer_that_lies_there(gone, monkeypatch, capsys):
    moved = gone.parent / "copies" / "step-000006"
    (checkpoint,) = manifest.checkpoints_in(gone / "checkpoints")
    shutil.copytree(checkpoint, moved)
    shutil.copytree(EARLIER_RUN / "store" / "tokenizer", gone.parent / "tokenizer")
    assert exported(moved, monkeypatch) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_a_checkpoint_that_records_no_bos_is_exported_as_its_texts_began_and_says_so(
    tmp_path, monkeypatch, capsys
):
    """Runs of earlier versions; `--no-bos` contradicts the assumption."""
    shutil.copytree(EARLIER_RUN / "run", tmp_path / "run")
    rewrite(tmp_path / "run", "data", sources=[{"store": str(EARLIER_RUN / "store")}])
    for options, adds in (((), True), (("--no-bos",), False), (("--bos",), True)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert exported(tmp_path / "run", monkeypatch, *options) == 0
        shown = capsys.readouterr().out
        assert ("assumed by its recipe: yes" in shown) == (not options)
        assert f"its tokenizer adds {'BOS <s>' if adds else 'no BOS'}; generation stops at </s>" in shown
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert (tokenizer("|")["input_ids"][0] == 1) == adds


def test_a_tokenizer_that_cannot_be_this_models_is_refused_before_anything_is_written(
    gone, monkeypatch, capsys
):
    """Texts began with BOS, by the recipe; a named tokenizer may have none, or ids that the model does not embed."""
    named = gone.parent / "named"
    tokenizer = without_bos(named)
    assert exported(gone, monkeypatch, "--tokenizer", named, "--bos") == 2
    assert f"tokenizer '{named}' has no BOS token, and --bos asks for one" in capsys.readouterr().err
    assert exported(gone, monkeypatch, "--tokenizer", named, "--no-bos") == 0
    shutil.rmtree(gone.parent / "out")
    tokenizer.add_tokens([f"more{number}" for number in range(1000)])
    tokenizer.save_pretrained(named)
    assert exported(gone, monkeypatch, "--tokenizer", named, "--no-bos") == 2
    assert "they do not belong together" in capsys.readouterr().err
    assert not (gone.parent / "out").exists()


def test_a_tokenizer_without_bos_is_refused_where_the_checkpoint_records_that_texts_began_with_one(
    gone, monkeypatch, capsys
):
    named = gone.parent / "named"
    without_bos(named)
    (checkpoint,) = manifest.checkpoints_in(gone / "checkpoints")
    content = json.loads((checkpoint / manifest.MANIFEST).read_text())
    del content["seal"]
    content["export"] = {"add_bos": True, "generation_config": {"eos_token_id": 2}}
    manifest.write_manifest(checkpoint, content)
    assert exported(gone, monkeypatch, "--tokenizer", named) == 2
    assert "has no BOS token, and the training texts began with one" in capsys.readouterr().err


def test_a_start_model_that_has_moved_is_named_with_its_option(gone, monkeypatch, capsys):
    """Of a full fine-tuning too, where the recipe does not hold the config."""
    rewrite(gone, "model", path=str(gone.parent / "moved"), config=None)
    shutil.copytree(EARLIER_RUN / "store" / "tokenizer", gone / "tokenizer")
    assert exported(gone, monkeypatch) == 2
    assert capsys.readouterr().err.endswith("(here: --base)\n")


@pytest.fixture
def blendable(gone) -> Path:
    """A run of all weights by an earlier version, which records no fingerprint, and its base in `base`."""
    (checkpoint,) = manifest.checkpoints_in(gone / "checkpoints")
    config = json.loads((checkpoint / manifest.MANIFEST).read_text())["recipe"]["model"]["config"]
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(gone.parent / "base")
    rewrite(gone, "model", path=str(gone.parent / "base"))
    shutil.copytree(EARLIER_RUN / "store" / "tokenizer", gone / "tokenizer")
    return gone


def test_one_blend_is_the_output_folder_and_an_old_run_s_base_is_warned_of(blendable, monkeypatch, capsys):
    assert exported(blendable, monkeypatch, "--blend", "0.7") == 0
    assert "does not record its base's fingerprint" in capsys.readouterr().out
    out = blendable.parent / "out"
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    assert "not recorded by the run" in (out / "README.md").read_text()


def test_several_blends_have_a_folder_each(blendable, monkeypatch):
    assert exported(blendable, monkeypatch, "--blend", "0.5,0.125,1") == 0
    folders = sorted((blendable.parent / "out").iterdir())
    assert [folder.name for folder in folders] == ["blend-0.125", "blend-0.50", "blend-1.00"]
    for folder in folders:
        assert LlamaForCausalLM.from_pretrained(folder).num_parameters() > 0
        assert AutoTokenizer.from_pretrained(folder).bos_token_id == 1


def test_a_blend_without_its_base_names_the_option_that_says_where_it_is(blendable, monkeypatch, capsys):
    (blendable.parent / "base").rename(blendable.parent / "moved")
    assert exported(blendable, monkeypatch, "--blend", "0.5") == 2
    assert capsys.readouterr().err.endswith("does not exist (here: --base)\n")
    assert exported(blendable, monkeypatch, "--blend", "0.5", "--base", blendable.parent / "moved") == 0


def test_a_base_of_another_shape_is_refused_where_no_fingerprint_is_recorded(blendable, monkeypatch, capsys):
    config = LlamaConfig.from_pretrained(blendable.parent / "base")
    config.intermediate_size *= 2
    LlamaForCausalLM(config).save_pretrained(blendable.parent / "other")
    assert exported(blendable, monkeypatch, "--blend", "0.5", "--base", blendable.parent / "other") == 2
    shown = capsys.readouterr().err
    assert "intermediate_size: 64 at the path, 32 in the recipe (here: --base)" in shown
    assert not (blendable.parent / "out").exists()


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ("1.2", "1.2 is not between 0"),
        ("-0.1", "-0.1 is not between 0"),
        ("nan", "nan is not between 0"),
        ("0.5,0.50", "0.5 is there twice"),
        ("0.5;0.7", "is not a number"),
    ],
)
def test_shares_that_are_none_are_refused(gone, monkeypatch, capsys, shares, problem):
    with pytest.raises(SystemExit) as refused:
        exported(gone, monkeypatch, "--blend", shares)
    assert refused.value.code == 2 and problem in capsys.readouterr().err


def test_adapters_of_a_run_that_trained_all_weights_are_refused(gone, monkeypatch, capsys):
    assert exported(gone, monkeypatch, "--adapter") == 2
    assert "trained all weights, and has no adapters" in capsys.readouterr().err
    assert not (gone.parent / "out").exists()


def test_adapters_of_a_random_base_are_refused(gone, monkeypatch, capsys):
    rewrite(gone, "model", lora=LoraSpec().model_dump(mode="json"))
    assert exported(gone, monkeypatch, "--adapter") == 2
    assert "began with random weights (model.path: null), which are in no file" in capsys.readouterr().err


def test_a_blend_of_adapters_alone_is_refused(gone, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        exported(gone, monkeypatch, "--adapter", "--blend", "0.5")
    assert refused.value.code == 2 and "--blend mixes whole models" in capsys.readouterr().err


def two_checkpoints(run: Path) -> RunFolder:
    """A run with the same weights as steps 3 and 6, the former the best one."""
    (checkpoint,) = manifest.checkpoints_in(run / "checkpoints")
    earlier = checkpoint.with_name("step-000003")
    shutil.copytree(checkpoint, earlier)
    content = json.loads((earlier / manifest.MANIFEST).read_text()) | {"step": 3}
    del content["seal"]
    manifest.write_manifest(earlier, content)
    shutil.copytree(EARLIER_RUN / "store" / "tokenizer", run / "tokenizer")
    best.write(RunFolder(run), BestCheckpoint(step=3, metric="d2n/headline", mode="max", value=0.5))
    return RunFolder(run)


@pytest.mark.parametrize(
    ("options", "step"),
    [((), 3), (("--step", "best"), 3), (("--step", "last"), 6), (("--step", "3"), 3), (("--step", 6), 6)],
)
def test_the_best_checkpoint_is_exported_unless_another_is_asked_for(
    gone, monkeypatch, capsys, options, step
):
    two_checkpoints(gone)
    assert exported(gone, monkeypatch, *options) == 0
    shown = capsys.readouterr().out
    assert f"exporting step {step} of" in shown
    assert ("the best checkpoint is exported: step 3, d2n/headline 0.5 (max)" in shown) == (
        options in ((), ("--step", "best"))
    )


def test_a_step_that_is_not_there_is_named_with_those_that_are(gone, monkeypatch, capsys):
    folder = two_checkpoints(gone)
    assert exported(gone, monkeypatch, "--step", "4") == 2
    assert "has no checkpoint of that step; there are 3, 6" in capsys.readouterr().err
    assert exported(folder.checkpoints / "step-000006", monkeypatch, "--step", "last") == 2
    assert "is no run folder" in capsys.readouterr().err
    best.write(folder, None)
    assert exported(gone, monkeypatch, "--step", "best") == 2
    assert "keeps none (checkpoint.keep_best); name last, or a step" in capsys.readouterr().err
    assert exported(gone, monkeypatch) == 0, "without a best one the newest"
    assert "exporting step 6 of" in capsys.readouterr().out
