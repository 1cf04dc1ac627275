"""Export: an ordinary Hugging Face folder, bit-equal to the live weights, complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.model.architecture import adopt_special_tokens, model_config
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.families import FAMILIES
from bico_ds.model.weights.export_model import export_model
from tests.model.rope_types import CASES, ROPE, architecture


def tiny_model(*, tied: bool = True, dtype: str = "bf16", model_type: str = "llama") -> TrainableModel:
    config = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "tie_word_embeddings": tied,
        "rope_theta": 500000.0,
    }
    spec = ModelSpec(config=config, dtype=dtype)
    return build_model(spec, seed=1, ds_config=None, device="cpu", longest_document=64)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_export_loads_in_transformers_bit_equal_and_generates_alike(
    tmp_path: Path, tied: bool, model_type: str
) -> None:
    live = tiny_model(tied=tied, model_type=model_type).causal_lm.eval()
    export_model(live, None, tmp_path / "out", "bf16", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, ours), (other_name, theirs) in zip(
        live.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(ours, theirs)
    assert loaded.config.rope_parameters == live.config.rope_parameters
    prompt = torch.randint(0, 101, (1, 7))
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(live.generate(prompt, **generate), loaded.generate(prompt, **generate))


def test_what_a_crash_left_of_the_folder_before_last_does_not_stop_the_next_export(tmp_path: Path) -> None:
    folder, left = tmp_path / "out", tmp_path / ".out.previous"
    for path in (folder, left):
        path.mkdir()
        (path / "config.json").write_text("{}")
    export_model(tiny_model(), None, folder, "fp32", overwrite=True)
    assert (folder / "model.safetensors").is_file() and not left.exists()


@pytest.mark.usefixtures("usual_umask")
def test_checksums_name_every_file_and_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_model(tiny_model(), None, folder, "fp32")
    sums = json.loads((folder / "checksums.json").read_text())
    assert set(sums) == {path.name for path in folder.iterdir()} - {"checksums.json"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir()), "others may read a model"
    before = (folder / "checksums.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        export_model(tiny_model(), None, folder)
    assert (folder / "checksums.json").read_bytes() == before


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "out"
    export_model(tiny_model(), None, folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bico_ds.model.weights.shards.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        export_model(tiny_model(tied=False), None, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_with_several_chat_templates_is_exported_with_all_of_them(tmp_path, bpe_tokenizer):
    """transformers keeps all but one in a folder of their own."""
    tokenizer = load_tokenizer(Path(bpe_tokenizer))
    tokenizer.chat_template = {"default": "{{ bos_token }}", "tool_use": "tools"}
    export_model(tiny_model(), ExportedTokenizer(tokenizer, True), tmp_path / "out", "fp32")
    sums = json.loads((tmp_path / "out" / "checksums.json").read_text())
    assert "additional_chat_templates/tool_use.jinja" in sums
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("model_type", "rope"), CASES)
def test_a_config_says_its_rotary_embedding_by_the_names_of_transformers_4_too(tmp_path, model_type, rope):
    spec = ModelSpec(config=architecture(model_type, rope), dtype="bf16")
    live = build_model(spec, seed=1, ds_config=None, device="cpu", longest_document=64).causal_lm
    export_model(live, None, tmp_path / "out", "bf16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    asked = ROPE[rope]
    scaling = dict(live.config.rope_parameters)
    assert written["rope_theta"] == scaling.pop("rope_theta")
    assert written["rope_theta"] == asked.get("rope_theta", 7e4)
    if rope.startswith("default"):
        assert written["rope_scaling"] is None
    else:
        scaling.pop("type", None)
        assert written["rope_scaling"] == scaling
        assert {**written["rope_scaling"], **asked["rope_scaling"]}.items() >= written["rope_scaling"].items()
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    kept = {key: value for key, value in live.config.rope_parameters.items() if key != "type"}
    assert loaded.rope_parameters == kept and loaded.dtype == torch.bfloat16


def test_the_generation_config_of_a_published_model_is_exported_as_it_is(tmp_path, bpe_tokenizer):
    """Llama 2's first one has a temperature, and no `do_sample`; transformers saves it until a token of it changes."""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}')
    model, tokenizer = tiny_model(), ExportedTokenizer(load_tokenizer(Path(bpe_tokenizer)), True)
    model.causal_lm.generation_config = GenerationConfig.from_pretrained(tmp_path)
    adopt_special_tokens(tokenizer, model.causal_lm.config, model.causal_lm.generation_config)
    export_model(model, tokenizer, tmp_path / "out", "fp32")
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (values["temperature"], values["top_p"]) == (0.9, 0.6)
    assert values["eos_token_id"] == tokenizer.eos_token_id
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.top_p == 0.6


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_an_export_is_the_model_of_a_recipe_that_says_type_for_rope_type(tmp_path, rope_type):
    config = architecture("llama", "default") | {"rope_scaling": {"type": rope_type, "factor": 3.0}}
    spec = ModelSpec(config=config, dtype="fp32")
    live = build_model(spec, seed=1, ds_config=None, device="cpu", longest_document=64).causal_lm
    export_model(live, None, tmp_path / "out", "fp32")
    again = spec.model_copy(update={"path": ModelSpec(path=str(tmp_path / "out")).path})
    assert model_config(again).rope_parameters["rope_type"] == rope_type
    other = {**config, "rope_scaling": {"type": rope_type, "factor": 4.0}}
    with pytest.raises(UserError, match="rope_parameters"):
        model_config(again.model_copy(update={"config": other}))
