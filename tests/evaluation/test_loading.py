"""What an evaluation refuses of a model folder before weights are loaded, and the name that it gives to weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import write_facts
from bico_ds.evaluation.loading import (
    check_model_folder,
    load_tokenizer_and_context,
    weights_stamp,
)
from tests.model.tiny_llama import save_llama


def change(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_facts(FactsSpec(name_first=1, description_first=1, both=18), tmp_path / "facts")
    save_llama(tmp_path / "model")
    for file in (tmp_path / "facts" / "tokenizer").iterdir():
        file.rename(tmp_path / "model" / file.name)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers: must be at least 1, found 0"),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads: must divide"),
        ({"rms_norm_eps": -1.0}, "config.json: rms_norm_eps: must be greater than 0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    model: Path, values: dict[str, object], message: str
) -> None:
    change(model / "config.json", values)
    with pytest.raises(UserError, match=f"^--model {model}: {message}"):
        load_tokenizer_and_context(model)


def test_weights_under_names_that_nobody_reads_are_refused(model: Path) -> None:
    for file in [*model.glob("model-*"), model / "model.safetensors.index.json"]:
        file.rename(model / file.name.replace("model", "consolidated"))
    with pytest.raises(UserError, match="has neither model.safetensors nor model.safetensors.index.json"):
        check_model_folder(model)


def test_the_stamp_of_weights_changes_with_the_files_that_are_read(model: Path) -> None:
    all_shards = weights_stamp(model)
    index = model / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, {"weight_map": dict.fromkeys(names, min(names.values()))})
    assert weights_stamp(model) != all_shards


def test_shards_in_a_folder_below_are_found_and_stamped(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    (model / "shards").mkdir()
    for file in model.glob("model-*"):
        file.rename(model / "shards" / file.name)
    names = json.loads(index.read_text())["weight_map"]
    change(index, {"weight_map": {name: f"shards/{file}" for name, file in names.items()}})
    check_model_folder(model)
    before = weights_stamp(model)
    shard = model / "shards" / min(names.values())
    os.utime(shard, ns=(0, 0))
    assert weights_stamp(model) != before
