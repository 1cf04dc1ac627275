"""What a stranger's model folder says of its model: read within bounds, refused in one line, and none of its code run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from bico_ds.commands.evaluate import main as evaluate
from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.prepare.shards import hub_shards
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.evaluation.loading import load_for_evaluation, load_generation_config
from bico_ds.model import model_folder
from bico_ds.model.architecture import first_layers, meta_model, model_config
from bico_ds.model.build import build_model
from bico_ds.model.model_folder import read_generation_config
from bico_ds.model.swap import check_attention
from bico_ds.model.weights.export_model import export_model
from bico_ds.planner.architecture import read_architecture
from tests.damaged_files import damaged
from tests.model import tiny_llama
from tests.model.refusals import refusal

CODE = "open({!r}, 'w').close()\nclass Evil: pass\n"
AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", None],
}


def start(folder: Path, device: str = "cpu") -> Any:
    return build_model(ModelSpec(path=str(folder)), seed=1, ds_config=None, device=device)


READERS = {
    "a start": start,
    "a dry run": lambda folder: start(folder, "meta"),
    "an evaluation": load_for_evaluation,
    "its stops": load_generation_config,
    "its tokenizer": load_tokenizer,
}


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a tokenizer of its vocabulary."""
    monkeypatch.setitem(tiny_llama.ARCHITECTURE, "vocab_size", 67)
    write_facts(FactsSpec(name_first=1, description_first=1, both=18), tmp_path / "facts")
    tiny_llama.save_llama(tmp_path / "model")
    shutil.copytree(tmp_path / "facts" / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    return tmp_path / "model"


@pytest.fixture
def marker(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the model's code would write; whoever is asked says yes."""
    marker = model.parent / "ran"
    (model / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (model / name).write_text(CODE.format(str(marker)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    model_folder.warn_once.cache_clear()
    return marker


@pytest.mark.parametrize("reader", READERS)
def test_code_of_a_model_that_transformers_knows_is_not_run_and_said_once(
    model: Path, marker: Path, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(model / "config.json", auto_map=AUTO_MAP)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    for _ in range(2):
        READERS[reader](model)
    assert not marker.exists()
    said = [record.message for record in caplog.records if "auto_map" in record.message]
    assert len(said) == len(set(said)) == (2 if reader == "an evaluation" else 1)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "its tokenizer"])
def test_a_model_that_only_its_own_code_defines_is_refused_and_nobody_is_asked(
    model: Path, marker: Path, reader: str
) -> None:
    change(model / "config.json", auto_map=AUTO_MAP, model_type="evil")
    with pytest.raises(
        UserError, match="model_type: 'evil' is no model of transformers: .*such code is never run"
    ):
        READERS[reader](model)
    assert not marker.exists()


@pytest.mark.parametrize("classes", [["evil.Evil", "evil.Evil"], {"AutoTokenizer": [None, "evil.Evil"]}])
def test_a_tokenizer_that_only_its_own_code_defines_is_refused(
    model: Path, marker: Path, classes: Any
) -> None:
    change(model / "tokenizer_config.json", auto_map=classes, tokenizer_class="EvilTokenizer")
    for reader in ("its tokenizer", "an evaluation"):
        with pytest.raises(UserError, match="auto_map in its tokenizer_config.json names code .* never run"):
            READERS[reader](model)
    assert not marker.exists()


@pytest.mark.parametrize("value", ["stranger/kernel", "paged|stranger/kernel@main:forward", {"": "a/b"}])
def test_a_kernel_of_the_hub_is_never_fetched(model: Path, value: Any) -> None:
    config = (model / "config.json").read_text()
    for key in ("attn_implementation", "_attn_implementation"):
        (model / "config.json").write_text(config)
        change(model / "config.json", **{key: value})
        with pytest.raises(
            UserError, match=f"config.json: {key}: .* names code on the hub, which is never run"
        ):
            start(model)


def test_an_export_carries_no_name_of_code_on(model: Path, marker: Path, tmp_path: Path) -> None:
    change(model / "config.json", auto_map=AUTO_MAP)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change(model / "generation_config.json", custom_generate="stranger/decoding", trust_remote_code=True)
    export_model(start(model), ExportedTokenizer(load_tokenizer(model), None), tmp_path / "plain")
    written = "".join(file.read_text() for file in (tmp_path / "plain").glob("*.json"))
    assert not [
        word for word in ("auto_map", "evil", "custom_generate", "trust_remote_code") if word in written
    ]
    assert not marker.exists()


def test_a_script_beside_a_data_set_is_not_run(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(CODE.format(str(marker)))
    (tmp_path / "set" / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="scripts are no longer supported"):
        hub_shards(str(tmp_path / "set"), config=None, split="train")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[]", "config.json: cannot be read: holds a list, not an object; copy it again"),
        ("config.json", "null", "config.json: cannot be read: holds null, not an object"),
        ("config.json", "", "config.json: cannot be read: empty"),
        ("config.json", '{"model_type": "llama"', "config.json: cannot be read: not valid JSON"),
        ("config.json", '{"a":' * 50_000, "config.json: cannot be read: nested deeper than"),
        ("config.json", '{"model_type": ["llama"]}', "config.json: model_type: must be a text, found \\['llama'\\]"),
        ("config.json", '{"vocab_size": 67}', "config.json: model_type: is missing"),
        ("config.json", '{"model_type": "lama"}', "unknown model type 'lama' \\(did you mean 'llama'"),
        ("generation_config.json", "[]", "generation_config.json: cannot be read: holds a list, not an object"),
        ("generation_config.json", "null", "generation_config.json: cannot be read: holds null"),
        ("generation_config.json", '{"eos_token', "generation_config.json: cannot be read: not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id: must be the number of a token, .* '2'"),
        ("generation_config.json", '{"eos_token_id": [2, 0.5]}', "eos_token_id: must be the number of a token"),
        ("generation_config.json", '{"pad_token_id": true}', "pad_token_id: must be the number of a token"),
    ],
)  # fmt: skip
def test_a_settings_file_of_another_kind_is_refused_by_its_name_before_weights_are_read(
    model: Path, name: str, content: str, words: str
) -> None:
    (model / name).write_text(content)
    for reader in ("a start", "a dry run", "its stops"):
        with pytest.raises(UserError, match=words) as refused:
            READERS[reader](model)
        assert str(model) in str(refused.value)


def test_a_link_to_a_settings_file_that_is_gone_is_not_taken_for_none(model: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        (model / name).unlink()
        (model / name).symlink_to("gone.json")
        with pytest.raises(UserError, match=f"{name}: cannot be read: a link to a file that is not there"):
            start(model)


def cut_a_shard(model: Path) -> None:
    shard = max(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])


def forget_metadata(model: Path) -> None:
    change(model / "model.safetensors.index.json", metadata=None)


def name_another_size(model: Path) -> None:
    change(model / "config.json", intermediate_size=128)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut_a_shard, "has .* bytes, .* by its header: copy it again"),
        (lambda model: min(model.glob("*.safetensors")).write_bytes(b""), r"is cut short .*\(0 bytes\)"),
        (lambda model: (model / "model.safetensors.index.json").write_text("[]"), "is not a weights index"),
        (forget_metadata, "has no metadata, without which transformers does not read it"),
        (lambda model: (model / "generation_config.json").write_text("[]"), "holds a list, not an object"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json: cannot be read: holds a list"),
        (lambda model: (model / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda model: change(model / "config.json", model_type="t5"), "a t5 model is no causal language model"),
        (name_another_size, "6 mismatched keys, the first is model.layers.0.mlp.down_proj.weight"),
    ],
)  # fmt: skip
def test_evaluate_refuses_a_damaged_model_with_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], harm: Any, words: str
) -> None:
    harm(model)
    asked = [
        "--data",
        str(model.parent / "facts"),
        "--tasks",
        "n2d",
        "--output",
        str(model.parent / "out.json"),
    ]
    assert evaluate(["--model", str(model), *asked]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(model) in line
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(line)


def test_an_answer_may_end_at_a_token_that_the_tokenizer_lacks(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model / "generation_config.json", eos_token_id=[2, 900])
    asked = ["--data", str(model.parent / "facts"), "--tasks", "n2d", "--limit", "1", "--max-new-tokens", "1"]
    assert evaluate(["--model", str(model), *asked, "--output", str(model.parent / "out.json")]) == 0
    assert "or token 900, which its tokenizer lacks" in capsys.readouterr().out


def test_any_damage_to_a_config_is_one_error(tmp_path: Path) -> None:
    """With rotations, layer types and names of code, as published configs have them."""
    values = LlamaConfig(**tiny_llama.ARCHITECTURE).to_dict()
    rotation = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    values |= {
        "rope_parameters": rotation,
        "auto_map": AUTO_MAP,
        "torch_dtype": "bfloat16",
        "model_type": "llama",
    }
    spec = ModelSpec(path=str(tmp_path))

    def read() -> None:
        config = model_config(spec)
        check_attention(config, longest_document=8)
        meta_model(first_layers(config)).config.to_json_string()

    passed = 0
    for content in damaged(json.dumps(values).encode(), count=60):
        (tmp_path / "config.json").write_bytes(content)
        refusal(lambda: read_architecture(spec))
        passed += refusal(read) is None
    assert passed


def test_any_damage_to_a_generation_config_is_one_error(tmp_path: Path) -> None:
    values = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "do_sample": True,
        "temperature": 0.6,
        "suppress_tokens": [1],
    }
    config, passed = LlamaConfig(**tiny_llama.ARCHITECTURE), 0
    for content in damaged(json.dumps(values).encode(), count=150):
        (tmp_path / "generation_config.json").write_bytes(content)
        passed += (
            refusal(lambda: json.loads(read_generation_config(tmp_path, config).to_json_string())) is None
        )
    assert passed
