"""What an evaluation refuses of a model folder before weights are loaded, and the name that it gives to weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.evaluation.loading import (
    check_model_folder,
    load_for_evaluation,
    load_generation_config,
    load_tokenizer_and_context,
    weights_stamp,
)
from bico_ds.model.build import build_model
from bico_ds.model.weights.export_adapter import export_adapter
from bico_ds.model.weights.export_model import export_model
from tests.model.tiny_llama import ARCHITECTURE, save_llama


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


def adapters_on(model: Path, dtype: str, folder: Path) -> Path:
    """A folder with adapters that were trained on `model`; beside it, in `merged`, the whole model.

    `model` gets weights of its tokenizer's size.
    """
    for file in [*model.glob("model-*"), model / "model.safetensors.index.json"]:
        file.unlink()
    vocabulary = {"vocab_size": len(load_tokenizer(model))}
    LlamaForCausalLM(LlamaConfig(**ARCHITECTURE | vocabulary)).save_pretrained(model, max_shard_size="20KB")
    spec = ModelSpec(path=str(model), dtype=dtype, lora=LoraSpec(rank=4))
    trained = build_model(spec, seed=1, ds_config=None, device="cpu")
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape)).to(parameter.dtype)
    tokenizer = load_tokenizer(model)
    export_adapter(trained, spec, ExportedTokenizer(tokenizer, add_bos=True), folder / "adapters", dtype)
    export_model(trained, ExportedTokenizer(tokenizer, add_bos=True), folder / "merged", dtype)
    return folder / "adapters"


@pytest.mark.parametrize(
    ("trained", "asked"),
    [("bf16", "auto"), ("fp32", "auto"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")],
)
@torch.no_grad()
def test_adapters_are_evaluated_as_the_merged_export_is_bit_for_bit(
    model: Path, tmp_path: Path, trained: str, asked: str
) -> None:
    folder = adapters_on(model, trained, tmp_path)
    check_model_folder(folder)
    (own, _), (merged, _) = (
        load_for_evaluation(tmp_path / name, dtype=asked) for name in ("adapters", "merged")
    )
    assert own.dtype == merged.dtype
    ids = torch.randint(0, 50, (2, 30))
    assert torch.equal(own(ids).logits, merged(ids).logits)
    assert (
        own.generation_config.eos_token_id
        == merged.generation_config.eos_token_id
        == load_tokenizer(model).eos_token_id
    )
    assert load_generation_config(folder).to_dict() == load_generation_config(tmp_path / "merged").to_dict()
    assert load_tokenizer_and_context(folder)[1] == load_tokenizer_and_context(tmp_path / "merged")[1]


def test_adapters_on_another_base_than_theirs_are_refused_and_have_another_stamp(
    model: Path, tmp_path: Path
) -> None:
    folder = adapters_on(model, "fp32", tmp_path)
    before = weights_stamp(folder)
    other = (tmp_path / "merged" / "model.safetensors").read_bytes()
    for file in [*model.glob("model-*"), model / "model.safetensors.index.json"]:
        file.unlink()
    (model / "model.safetensors").write_bytes(other)
    assert weights_stamp(folder) != before
    with pytest.raises(
        UserError, match=f"^--model {folder}: the base in .* is not the one that these adapters"
    ):
        load_for_evaluation(folder)


def test_adapters_whose_base_is_gone_or_damaged_are_refused_before_weights_are_read(
    model: Path, tmp_path: Path
) -> None:
    folder = adapters_on(model, "fp32", tmp_path)
    next(model.glob("model-*")).unlink()
    with pytest.raises(UserError, match=f"^--model {folder}: its base {model}: .* shards are missing"):
        check_model_folder(folder)
    model.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=f"^--model {folder}: the base of these adapters, '{model}', is not here"
    ):
        check_model_folder(folder)
