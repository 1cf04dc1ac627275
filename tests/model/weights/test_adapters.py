"""Adapter folders: peft computes with them what the run's own model does, and a merge in memory is the merged export."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from bico_ds.model.weights.export_adapter import export_adapter
from bico_ds.model.weights.export_model import export_model
from tests.distributed.launching import exported_weights
from tests.model.tiny_llama import save_llama

# Of logits whose deviation is 0.11. fp32: other orders of summation. bf16: peft adds B(Ax) to an output, and a merge rounds
# sums of weights; against fp64 each of them, as the run's own model, was off by 0.0026 at most, in six draws.
CLOSE = {"fp32": 2e-5, "bf16": 1e-2}
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


def adapted(folder: Path, dtype: str, **lora: Any) -> TrainableModel:
    """A model on the base in `folder` whose adapters change it far beyond any rounding."""
    spec = spec_of(folder, dtype, **lora)
    model = build_model(spec, seed=1, ds_config=None, device="cpu")
    generator = fresh()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model.eval()


def spec_of(folder: Path, dtype: str, **lora: Any) -> ModelSpec:
    return ModelSpec(
        path=str(folder), dtype=dtype, lora=LoraSpec(**{"rank": 4, "alpha": 8, "dropout": 0.0} | lora)
    )


def written(tmp_path: Path, dtype: str = "fp32", **lora: Any) -> Path:
    """The folder of the adapters of a model on the base in `tmp_path/base`."""
    save_llama(tmp_path / "base", dtype=TORCH[dtype])
    model = adapted(tmp_path / "base", dtype, **lora)
    export_adapter(model, spec_of(tmp_path / "base", dtype, **lora), None, tmp_path / "adapters", dtype)
    return tmp_path / "adapters"


def tokens() -> Tensor:
    return torch.randint(0, 101, (2, 9), generator=fresh())


def fresh() -> torch.Generator:
    """Of other numbers in every call of pytest: `save_llama` seeds torch's own."""
    return torch.Generator().manual_seed(int(np.random.default_rng().integers(2**31)))


@pytest.mark.parametrize(("dtype", "rslora"), product(("fp32", "bf16"), (False, True)))
@torch.no_grad()
def test_peft_computes_what_the_runs_own_model_and_the_merged_export_do(tmp_path, dtype, rslora):
    save_llama(tmp_path / "base", dtype=TORCH[dtype])
    lora = {"rslora": rslora, "targets": ["q_proj", "v_proj", "down_proj"]}
    live = adapted(tmp_path / "base", dtype, **lora)
    export_adapter(live, spec_of(tmp_path / "base", dtype, **lora), None, tmp_path / "adapters", dtype)
    export_model(live, None, tmp_path / "merged", dtype)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", dtype=TORCH[dtype]).eval()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=TORCH[dtype])
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=TORCH[dtype])
    ids = tokens()
    expected = live.causal_lm(ids).logits
    for model in (by_peft, merged):
        torch.testing.assert_close(model(ids).logits, expected, atol=CLOSE[dtype], rtol=0)
    assert (plain(ids).logits - expected).abs().max() > 5 * CLOSE[dtype]
    if dtype == "fp32":
        answers = [
            model.generate(ids, max_new_tokens=8, do_sample=False)
            for model in (by_peft, merged, live.causal_lm)
        ]
        assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[2])


@pytest.mark.parametrize("rslora", [False, True])
def test_the_weights_that_the_folder_stands_for_are_base_plus_scaled_product(tmp_path, rslora):
    """By its files alone, in fp64: rsLoRA divides alpha by the root of the rank."""
    folder = written(tmp_path, rslora=rslora)
    base, stored = exported_weights(tmp_path / "base"), load_file(folder / ADAPTER_WEIGHTS)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    AdapterFolder(folder).merge_into(model)
    for name, weight in model.named_parameters():
        parts = [f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight" for part in "BA"]
        if parts[0] in stored:
            product_of = stored[parts[0]].double() @ stored[parts[1]].double()
            expected = base[name].double() + 8 / (2 if rslora else 4) * product_of
            torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=0)
        else:
            assert torch.equal(weight, base[name])
    assert len(stored) == 2 * 7 * 2


@pytest.mark.parametrize("trained", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_a_merge_in_memory_is_the_merged_export_bit_for_bit(tmp_path, trained, stored):
    """Whatever the dtype of the base's files: the run rounded them to its own, and so does the merge."""
    save_llama(tmp_path / "base", dtype=TORCH[stored])
    live = adapted(tmp_path / "base", trained)
    export_adapter(live, spec_of(tmp_path / "base", trained), None, tmp_path / "adapters", trained)
    export_model(live, None, tmp_path / "merged", "fp32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    AdapterFolder(tmp_path / "adapters").merge_into(model)
    expected = exported_weights(tmp_path / "merged")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_the_folder_is_what_peft_itself_writes(tmp_path):
    """But for the order of names, which peft takes from a set."""
    folder = written(tmp_path)
    config = LoraConfig(
        r=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
        target_modules=LoraSpec().targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "peft"
    )
    ours, theirs = (json.loads((path / ADAPTER_CONFIG).read_text()) for path in (folder, tmp_path / "peft"))
    assert ours.pop("target_modules") == LoraSpec().targets
    assert sorted(theirs.pop("target_modules")) == sorted(LoraSpec().targets)
    assert ours == theirs
    shapes = [
        {name: t.shape for name, t in load_file(path / ADAPTER_WEIGHTS).items()}
        for path in (folder, tmp_path / "peft")
    ]
    assert shapes[0] == shapes[1]
    assert set(json.loads((folder / "checksums.json").read_text())) == {
        file.name for file in folder.iterdir()
    } - {"checksums.json"}


@torch.no_grad()
def test_adapters_of_another_program_are_merged_as_peft_merges_them(tmp_path):
    save_llama(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=True
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=fresh()))
    theirs.save_pretrained(tmp_path / "peft")
    adapters = AdapterFolder.at(tmp_path / "peft")
    assert adapters is not None and adapters.fingerprint is None
    adapters.check()
    assert "no fingerprint says" in adapters.describe()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapters.merge_into(model)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_base_of_the_same_shape_is_refused_by_its_fingerprint(tmp_path, dtype):
    folder = written(tmp_path, dtype)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=TORCH[dtype])
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[[3, 4]] = weight[[4, 3]]
    with pytest.raises(
        UserError, match="is not the one that these adapters were trained on: its fingerprint is"
    ):
        AdapterFolder(folder).merge_into(model)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "use_dora: True asks for more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .* asks for more than plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: .* asks for more than plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' asks for more"),
        ({"bias": "all"}, "bias: 'all' asks for more"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' asks for more"),
        ({"peft_type": None}, "peft_type: None asks for more"),
        ({"of_a_later_peft": {"a": 1}}, "of_a_later_peft: .* asks for more"),
        ({"revision": "v2"}, "revision: 'v2' asks for more"),
        ({"r": 0}, "r: must be a number above 0, found 0"),
        ({"lora_alpha": "8"}, "lora_alpha: must be a number above 0, found '8'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: must name the folder of the base"),
        ({"base_model_name_or_path": "/gone/base"}, "the base of these adapters, '/gone/base', is not here"),
    ],
)
def test_a_config_that_is_no_plain_lora_on_a_base_at_hand_is_refused(tmp_path, changes, told):
    folder = written(tmp_path)
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=told):
        AdapterFolder(folder).check()


def test_weights_that_are_no_pairs_or_fit_no_weight_are_refused(tmp_path):
    folder = written(tmp_path)
    file, model = folder / ADAPTER_WEIGHTS, LlamaForCausalLM.from_pretrained(tmp_path / "base")
    stored = load_file(file)
    first = min(stored)
    other = first.replace("layers.0", "layers.9")
    both = {
        name.replace("layers.0", "layers.9"): tensor.clone()
        for name, tensor in stored.items()
        if "layers.0" in name
    }
    cases = (
        ({name: tensor for name, tensor in stored.items() if name != first}, "is not one of a pair"),
        (stored | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is not one of a pair"),
        ({}, "no adapters are in it"),
    )
    for tensors, told in cases:
        save_file(tensors, file)
        with pytest.raises(UserError, match=told):
            AdapterFolder(folder).check()
    for tensors, told in (
        (stored | both, "is of no weight of the base"),
        (stored | {first: torch.zeros(4, 5)}, "does not fit"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=told):
            AdapterFolder(folder).merge_into(model)
    assert other not in stored
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="only pickled ones .* can run code"):
        AdapterFolder(folder).check()


def test_a_whole_model_is_no_adapter_folder_and_adapters_are_no_base_to_train_from(tmp_path):
    folder = written(tmp_path)
    assert AdapterFolder.at(tmp_path / "base") is None and AdapterFolder.at(tmp_path / "none") is None
    with pytest.raises(
        UserError, match=r"holds adapters, and training begins with a whole model: .*bico-ds export"
    ):
        build_model(ModelSpec(path=str(folder)), seed=1, ds_config=None, device="cpu")
    shutil.copy(folder / ADAPTER_CONFIG, tmp_path / "base")
    assert AdapterFolder.at(tmp_path / "base") is None, (
        "what transformers would do with both is refused elsewhere"
    )


def test_adapters_of_a_random_base_are_refused_and_nothing_is_written(tmp_path):
    save_llama(tmp_path / "base", dtype=torch.float32)
    live = adapted(tmp_path / "base", "fp32")
    spec = spec_of(tmp_path / "base", "fp32").model_copy(update={"path": None})
    with pytest.raises(UserError, match="the base is in no file"):
        export_adapter(live, spec, None, tmp_path / "adapters", "fp32")
    assert not (tmp_path / "adapters").exists()


def test_peft_loads_the_folder_over_a_model_that_is_loaded_already(tmp_path):
    folder = written(tmp_path)
    over = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert over.peft_config["default"].r == 4
