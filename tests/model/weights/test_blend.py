"""Blends of base and run: the arithmetic, its ends bit for bit, and the bases that are refused.

The checkpoints have the form of ZeRO-1 and 2, which is one file; those of ZeRO-3: `tests/distributed/test_loading.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights import shards
from bico_ds.model.weights.blend import Blend
from bico_ds.model.weights.export_checkpoint import export_checkpoint
from bico_ds.model.weights.export_model import export_model
from tests.distributed.launching import exported_weights
from tests.model.tiny_llama import save_llama


def blends(*shares: float) -> dict[str, Blend]:
    made = [Blend(share=share, base="BASE", fingerprint="f00", run="mine", step=7) for share in shares]
    return {blend.folder: blend for blend in made}


def trained(spec: ModelSpec, checkpoint: Path) -> TrainableModel:
    """The run's model after a change of every trained weight, and its checkpoint without the frozen ones."""
    model = build_model(spec, seed=1, ds_config=None, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
                parameter.view(-1)[0] = -0.0
    checkpoint.mkdir()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"module": weights}, checkpoint / "mp_rank_00_model_states.pt")
    return model


ADAPTERS = LoraSpec(rank=3, alpha=6.0, dropout=0.0)


@pytest.mark.parametrize(
    ("stored", "tied", "lora"),
    [
        (torch.bfloat16, False, None),
        (torch.float32, True, None),
        (torch.bfloat16, True, ADAPTERS),
        (torch.float32, False, ADAPTERS),
    ],
)
def test_a_blend_lies_between_base_and_run_and_its_ends_are_theirs_bit_for_bit(tmp_path, stored, tied, lora):
    """Of a base in several files, in the run's dtype or another."""
    start = save_llama(tmp_path / "base", tied=tied, dtype=stored)
    spec = ModelSpec(path=str(tmp_path / "base"), lora=lora)
    model = trained(spec, tmp_path / "checkpoint")
    export_model(model, None, tmp_path / "live", "fp32")
    export_checkpoint(
        tmp_path / "checkpoint", spec, None, tmp_path / "out", "fp32",
        base=model.base, blends=blends(0, 0.125, 0.7, 1), max_shard_bytes=20_000,
    )  # fmt: skip
    ran = exported_weights(tmp_path / "live")
    loaded = {name: p.detach().bfloat16().float() for name, p in start.named_parameters()}
    assert loaded.keys() == ran.keys()
    assert len(list((tmp_path / "out" / "blend-0.70").glob("model-*.safetensors"))) > 1
    for folder, share in (("blend-0.00", 0), ("blend-0.125", 0.125), ("blend-0.70", 0.7), ("blend-1.00", 1)):
        for name, tensor in exported_weights(tmp_path / "out" / folder).items():
            between = loaded[name].double() + share * (ran[name].double() - loaded[name].double())
            torch.testing.assert_close(tensor.double(), between, rtol=1e-6, atol=1e-8)
            if share in (0, 1):
                end = ran[name] if share else loaded[name]
                assert torch.equal(tensor.view(torch.int32), end.view(torch.int32)), (name, share)


def test_each_blend_is_a_complete_folder_that_says_what_it_is(tmp_path):
    save_llama(tmp_path / "base")
    spec = ModelSpec(path=str(tmp_path / "base"))
    model = trained(spec, tmp_path / "checkpoint")
    out = tmp_path / "out"
    export_checkpoint(
        tmp_path / "checkpoint", spec, None, out, "bf16", base=model.base, blends=blends(0.5, 0.9)
    )
    assert sorted(path.name for path in out.iterdir()) == ["blend-0.50", "blend-0.90"]
    for folder in out.iterdir():
        sums = json.loads((folder / shards.CHECKSUMS).read_text())
        assert sums.keys() >= {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        text = (folder / "README.md").read_text()
        assert all(part in text for part in (str(float(folder.name[6:])), "BASE", "f00", "mine", "| 7 |"))


def test_another_base_is_refused_by_both_fingerprints_and_nothing_is_left(tmp_path):
    save_llama(tmp_path / "base")
    model = trained(ModelSpec(path=str(tmp_path / "base")), tmp_path / "checkpoint")
    other = build_model(ModelSpec(path=str(tmp_path / "base")), seed=1, ds_config=None, device="cpu")
    with torch.no_grad():
        other.causal_lm.model.norm.weight[3] += 0.5
    export_model(other, None, tmp_path / "other", "bf16")
    elsewhere = build_model(ModelSpec(path=str(tmp_path / "other")), seed=1, ds_config=None, device="cpu")
    assert model.base is not None and elsewhere.base is not None
    with pytest.raises(UserError, match="not the one that this checkpoint's run started from") as refusal:
        export_checkpoint(
            tmp_path / "checkpoint", ModelSpec(path=str(tmp_path / "other")), None, tmp_path / "out", "bf16",
            base=model.base, blends=blends(0.5, 0.9),
        )  # fmt: skip
    assert model.base[:12] in str(refusal.value) and elsewhere.base[:12] in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoint", "other"]


def test_a_run_from_random_weights_has_nothing_to_blend_with(tmp_path):
    save_llama(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    spec = ModelSpec(config=config)
    model = trained(spec, tmp_path / "checkpoint")
    assert model.base is None
    with pytest.raises(UserError, match="nothing to blend with"):
        export_checkpoint(tmp_path / "checkpoint", spec, None, tmp_path / "out", "bf16", blends=blends(0.5))
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_and_the_base_are_read_once_for_all_blends(tmp_path, monkeypatch):
    from bico_ds.model.weights.checkpoint_weights import UndividedCheckpoint
    from bico_ds.model.weights.load import SafetensorsFolder

    save_llama(tmp_path / "base")
    spec = ModelSpec(path=str(tmp_path / "base"))
    model = trained(spec, tmp_path / "checkpoint")
    read: list[tuple[str, str]] = []
    for source in (UndividedCheckpoint, SafetensorsFolder):
        original = source.read

        def noted(self, name, *rest, original=original):  # type: ignore[no-untyped-def]
            read.append((type(self).__name__, name))
            return original(self, name, *rest)

        monkeypatch.setattr(source, "read", noted)
    export_checkpoint(
        tmp_path / "checkpoint", spec, None, tmp_path / "out", "bf16", blends=blends(0.2, 0.5, 0.9)
    )
    assert len(read) == len(set(read)) == 2 * len(list(model.parameters()))
