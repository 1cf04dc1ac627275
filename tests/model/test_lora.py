"""LoRA: adapters are trained, the base stays, and the export is one plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.checksums import base_fingerprint
from bico_ds.model.weights.export_model import export_model
from tests.model.tiny_llama import save_llama


def adapted(folder: Path, seed: int = 1, **lora: object) -> TrainableModel:
    spec = ModelSpec(path=str(folder), dtype="fp32", lora=LoraSpec(rank=4, dropout=0.0, **lora))
    return build_model(spec, seed=seed, ds_config=None, device="cpu")


def batch() -> PackedBatch:
    torch.manual_seed(0)
    return PackedBatch(
        input_ids=torch.randint(0, 101, (9,)),
        position_ids=torch.arange(9),
        plan=build_plan("bidirectional", kept_lengths=[9]),
        loss_rows=torch.arange(4),
        targets=torch.randint(0, 101, (4,)),
        represented_tokens=9,
        documents=torch.zeros(1, 3, dtype=torch.int64),
    )


def test_only_adapters_learn_and_the_merged_export_computes_what_the_live_model_does(tmp_path: Path) -> None:
    save_llama(tmp_path / "base", dtype=torch.float32)
    model = adapted(tmp_path / "base")
    base = base_fingerprint(model.causal_lm)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven linears in two layers
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch()).loss.backward()
        optimizer.step()
    assert base_fingerprint(model.causal_lm) == base
    export_model(model, None, tmp_path / "merged", "fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.randint(0, 101, (2, 9))
    live = model.causal_lm.eval()(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, live, atol=2e-5, rtol=1e-5)
    assert (plain(tokens).logits - live).abs().max() > 1e-2


def test_fresh_adapters_change_nothing_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    save_llama(tmp_path, dtype=torch.float32)
    one, again, other = adapted(tmp_path), adapted(tmp_path), adapted(tmp_path, seed=2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (1, 9))
    assert torch.equal(one.causal_lm(tokens).logits, plain(tokens).logits)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    get = lambda model: model.causal_lm.get_parameter(name)  # noqa: E731
    assert torch.equal(get(one), get(again))
    assert not torch.equal(get(one), get(other))


def test_another_base_has_another_fingerprint(tmp_path: Path) -> None:
    save_llama(tmp_path, dtype=torch.float32)
    model = adapted(tmp_path)
    before = base_fingerprint(model.causal_lm)
    with torch.no_grad():
        weight = model.causal_lm.model.layers[1].mlp.up_proj.base_layer.weight
        weight[[3, 4]] = weight[[4, 3]]
    assert base_fingerprint(model.causal_lm) != before


def test_targets_that_are_no_linear_layer_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        adapted(tmp_path, targets=["q_porj"])
    with pytest.raises(UserError, match="no linear layer 'lm_head'"):
        adapted(tmp_path, targets=["lm_head"])
