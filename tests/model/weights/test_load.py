"""Loading: exactly the folder's weights, or one clear message before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import check_vocabulary, model_config, parameter_count
from bico_ds.model.build import build_model
from tests.model.tiny_llama import ARCHITECTURE, save_llama


def load(folder: Path, dtype: str = "bf16", **spec: object):
    return build_model(ModelSpec(path=str(folder), dtype=dtype, **spec), seed=1, ds_config=None, device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_are_the_folders_bit_by_bit(tmp_path: Path, tied: bool) -> None:
    saved = save_llama(tmp_path, tied=tied)
    loaded = load(tmp_path).causal_lm
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for (name, ours), (other, theirs) in zip(
        loaded.named_parameters(), saved.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    tokens = torch.randint(0, 101, (2, 9))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


def test_fp32_weights_are_cast_to_the_recipes_dtype(tmp_path: Path) -> None:
    saved = save_llama(tmp_path, dtype=torch.float32)
    loaded = load(tmp_path).causal_lm
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight.bfloat16())


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a folder, written again as one file."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update(surplus=torch.zeros(1)), "not in the model: surplus"),
        (
            lambda t: t.update({NORM: torch.zeros(31)}),
            r"input_layernorm.weight: \(31,\) in the file, \(32,\)",
        ),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), "is I8; training needs"),
    ],
)
def test_missing_extra_misshapen_and_quantized_tensors_are_errors(
    tmp_path: Path, change, message: str
) -> None:
    save_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_missing_and_a_truncated_shard_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=rf"{shard.name}' has {len(content) - 1} bytes, {len(content)} by its header"
    ):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"1 of \d+ shards are missing .*{shard.name}"):
        load(tmp_path)


def test_a_changed_tied_head_in_the_file_is_not_ignored(tmp_path: Path) -> None:
    save_llama(tmp_path, tied=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].view(-1)[7].neg_())
    with pytest.raises(UserError, match="differs from the embedding"):
        load(tmp_path)


def test_wrongly_read_weights_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    from bico_ds.model.weights.load import SafetensorsFolder

    read = SafetensorsFolder.read
    swapped = lambda *args: read(*args).flip(0) if args[1].endswith("up_proj.weight") else read(*args)  # noqa: E731
    monkeypatch.setattr(SafetensorsFolder, "read", swapped)
    with pytest.raises(RuntimeError, match=r"2 of 21 parameters differ .*up_proj"):
        load(tmp_path)


def test_pickled_weights_need_consent(tmp_path: Path) -> None:
    saved = save_llama(tmp_path)
    for shard in tmp_path.glob("model*"):
        shard.unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="allow_pickle"):
        load(tmp_path)
    loaded = load(tmp_path, allow_pickle=True).causal_lm
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)


def test_the_recipes_architecture_must_be_the_folders(tmp_path: Path) -> None:
    save_llama(tmp_path)
    assert model_config(ModelSpec(path=str(tmp_path), config=ARCHITECTURE)).hidden_size == 32
    other = ARCHITECTURE | {"num_hidden_layers": 3, "rope_theta": 5e5}
    with pytest.raises(
        UserError, match=r"num_hidden_layers: 2 at the path, 3 in the recipe\n.*rope_parameters"
    ):
        model_config(ModelSpec(path=str(tmp_path), config=other))


def test_typing_errors_in_a_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        model_config(ModelSpec(config={"hiden_size": 32}))
    with pytest.raises(UserError, match="does not exist"):
        model_config(ModelSpec(path=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE | {"model_type": "llama"}))
    with pytest.raises(UserError, match="holds no weights"):
        load(tmp_path)


def test_a_foreign_tokenizer_is_refused_and_a_padded_vocabulary_is_not() -> None:
    config = LlamaConfig(vocab_size=128256)
    check_vocabulary(config.vocab_size, 128000, tokenizer="t")
    for size in (128257, 32000):
        with pytest.raises(UserError, match="do not belong together"):
            check_vocabulary(config.vocab_size, size, tokenizer="t")


def test_parameters_are_counted_without_memory() -> None:
    llama_70b = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert parameter_count(model_config(ModelSpec(config=llama_70b))) == 70_553_706_496


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t for file in sorted(folder.glob("model-*.safetensors")) for name, t in load_file(file).items()
    }


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def change_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / name), **tensors}, folder / name, metadata={"format": "pt"})


def add_a_single_file(folder: Path) -> None:
    scaled = {name: tensor * 2 for name, tensor in tensors_of(folder).items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_single_file_and_take_the_shards(folder: Path) -> None:
    add_a_single_file(folder)
    for shard in folder.glob("model-*"):
        shard.unlink()


def add_a_single_file_and_break_the_index(folder: Path) -> None:
    add_a_single_file(folder)
    (folder / "model.safetensors.index.json").write_text("[")


def add_a_shard_of_an_older_save(folder: Path) -> None:
    save_file({NORM: torch.full((32,), 9.0).bfloat16()}, folder / "model-00009-of-00009.safetensors")


def add_the_original_format(folder: Path) -> None:
    save_file({"norm.weight": torch.ones(32)}, folder / "consolidated.safetensors")


def add_pickles(folder: Path) -> None:
    torch.save(
        {name: tensor * 3 for name, tensor in tensors_of(folder).items()}, folder / "pytorch_model.bin"
    )


def name_the_wrong_files(folder: Path) -> None:
    files = sorted({*index_of(folder).values()})
    moved = {name: files[(files.index(file) + 1) % len(files)] for name, file in index_of(folder).items()}
    index = {"metadata": {}, "weight_map": moved}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def store_a_tensor_twice(folder: Path, factor: float = 1.0) -> None:
    home = index_of(folder)[NORM]
    other = next(file for file in index_of(folder).values() if file != home)
    change_shard(folder, other, {NORM: load_file(folder / home)[NORM] * factor})


def add_a_rotary_buffer(folder: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_shard(folder, index_of(folder)[NORM], buffer)


@pytest.mark.parametrize(
    "change",
    [
        add_a_single_file, add_a_single_file_and_take_the_shards, add_a_single_file_and_break_the_index,
        add_a_shard_of_an_older_save, add_the_original_format, add_pickles, name_the_wrong_files, store_a_tensor_twice,
        add_a_rotary_buffer,
    ],
)  # fmt: skip
def test_of_a_folder_with_more_than_the_weights_that_is_read_which_transformers_reads(
    tmp_path: Path, change
) -> None:
    save_llama(tmp_path)
    change(tmp_path)
    ours = dict(load(tmp_path).causal_lm.named_parameters())
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_index_beside_the_single_file_is_a_leftover_and_a_warning_says_so(tmp_path: Path, caplog) -> None:
    save_llama(tmp_path)
    add_a_single_file(tmp_path)
    load(tmp_path)
    said = [record.message for record in caplog.records if record.name.startswith("bico_ds")]
    assert said == [
        f"'{tmp_path}': model.safetensors is read, as by transformers; model.safetensors.index.json beside it is not"
    ]


def test_safetensors_that_are_no_weights_do_not_hide_pickled_ones(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tensors = tensors_of(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    add_the_original_format(tmp_path)
    with pytest.raises(UserError, match="has neither model.safetensors nor model.safetensors.index.json"):
        load(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds pickled weights only"):
        load(tmp_path)
    loaded = load(tmp_path, allow_pickle=True).causal_lm
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("names", [[5], [5, "x"], [None], 7])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, names: Any) -> None:
    save_llama(tmp_path)
    weight_map = names if isinstance(names, int) else dict(enumerate(names))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="is not a weights index"):
        load(tmp_path)


def test_of_pickles_too_the_single_file_is_read(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tensors = tensors_of(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = load(tmp_path, allow_pickle=True).causal_lm
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])


def test_two_values_of_a_tensor_are_refused_with_both_files(tmp_path: Path) -> None:
    save_llama(tmp_path)
    store_a_tensor_twice(tmp_path, factor=7.0)
    with pytest.raises(
        UserError, match=rf"tensor '{NORM}' is in '.*safetensors' and, with other values, in '.*'"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"holds an adapter \({name}\).*merge it"):
        load(tmp_path)
