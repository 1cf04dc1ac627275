"""The export of a checkpoint whose data are not on this machine: by the run's own tokenizer, or a named one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bico_ds.checkpoint import manifest
from bico_ds.commands import export as export_hf
from bico_ds.config.schema import LoraSpec
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
