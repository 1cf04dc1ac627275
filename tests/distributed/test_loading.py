"""Loading, LoRA and export under ZeRO-3 on real processes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.optimizers import ADAMW
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import build_model
from bico_ds.model.weights.adapter_folder import AdapterFolder
from bico_ds.model.weights.blend import Blend
from bico_ds.model.weights.checksums import base_fingerprint
from bico_ds.model.weights.export_adapter import export_adapter, export_adapter_checkpoint
from bico_ds.model.weights.export_checkpoint import export_checkpoint
from bico_ds.model.weights.export_model import export_model
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import read_zero
from bico_ds.planner.storage import checkpoint_bytes
from tests.distributed.launching import exported_weights
from tests.distributed.model_ranks import causal_batch, ds_config, run_on_ranks

pytestmark = pytest.mark.distributed


def save_llama(folder: Path, seed: int = 5) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=63, num_hidden_layers=2, num_attention_heads=6, vocab_size=101
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")


def load_train_and_export(rank: int, world_size: int, folder: str) -> None:
    import deepspeed

    root = Path(folder)
    config = ds_config(world_size) | {"bf16": {"enabled": True}}
    model = build_model(ModelSpec(path=f"{folder}/base"), seed=1, ds_config=config, device="cpu")
    own = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    total = sum(parameter.ds_numel for parameter in model.parameters())
    assert total / world_size <= own < total / world_size + len(list(model.parameters()))
    export_model(model, None, root / "loaded", max_shard_bytes=20_000)
    # Rank 0 refuses; no rank hangs or goes on.
    with pytest.raises(UserError, match="exists and is not empty"):
        export_model(model, None, root / "base")

    spec = ModelSpec(path=f"{folder}/base", lora=LoraSpec(rank=4, dropout=0.0), activation_checkpointing=1)
    adapted = build_model(spec, seed=1, ds_config=config, device="cpu")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=adapted, model_parameters=trained, config=config)
    before = base_fingerprint(adapted.causal_lm)
    for step in range(2):
        loss = engine(causal_batch(step, [9, 4] if rank == 0 else [6], 8 if rank == 0 else 0)).loss
        engine.backward(loss)
        engine.step()
    assert base_fingerprint(adapted.causal_lm) == before
    export_model(engine.module, None, root / "merged")
    export_adapter(engine.module, spec, None, root / "adapters", "bf16")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_adapter(engine.module, spec, None, root / "base", "bf16")
    engine.save_checkpoint(str(root), tag="lora", save_latest=False, exclude_frozen_parameters=True)
    recorded = base_fingerprint(engine.module)  # as in a manifest
    if rank == 0:
        (root / "fingerprint").write_text(before)
        (root / "recorded").write_text(recorded)
        assert engine.module.base == recorded, (
            "found when the weights were verified, without a second reading"
        )

    for stage in (1, 2):
        train_undivided_adapters(rank, world_size, root, stage)

    full = build_model(ModelSpec(path=f"{folder}/base"), seed=1, ds_config=config, device="cpu")
    assert full.base is not None
    if rank == 0:
        (root / "started").write_text(full.base)
    engine, *_ = deepspeed.initialize(model=full, config=config)
    loss = engine(causal_batch(3, [9, 4], 8)).loss
    engine.backward(loss)
    engine.step()
    export_model(engine.module, None, root / "trained")
    engine.save_checkpoint(str(root), tag="full", save_latest=False)


def train_undivided_adapters(rank: int, world_size: int, root: Path, stage: int) -> None:
    """Below ZeRO-3, with rsLoRA; the live adapters and a checkpoint are left."""
    import deepspeed

    config = ds_config(world_size, stage) | {"bf16": {"enabled": True}}
    spec = ModelSpec(path=str(root / "base"), lora=LoraSpec(rank=4, dropout=0.0, rslora=True))
    adapted = build_model(spec, seed=1, ds_config=config, device="cpu")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=adapted, model_parameters=trained, config=config)
    for step in range(2):
        loss = engine(causal_batch(step, [9, 4] if rank == 0 else [6], 8 if rank == 0 else 0)).loss
        engine.backward(loss)
        engine.step()
    export_adapter(engine.module, spec, None, root / f"adapters-{stage}", "bf16")
    engine.save_checkpoint(str(root), tag=f"lora-{stage}", save_latest=False, exclude_frozen_parameters=True)


def check_adapters(root: Path, stage: int, spec: ModelSpec) -> None:
    """From the checkpoint the same bytes as from the live model; with peft, what the merged model computes."""
    name = "" if stage == 3 else f"-{stage}"
    live, later = root / f"adapters{name}", root / f"adapters-later{name}"
    recorded = (root / "recorded").read_text()
    export_adapter_checkpoint(root / f"lora{name}", spec, None, later, "bf16", base=recorded)
    assert {file.name: file.read_bytes() for file in later.iterdir()} == {
        file.name: file.read_bytes() for file in live.iterdir()
    }
    merged = root / f"merged-of-adapters{name}"
    export_checkpoint(root / f"lora{name}", spec, None, merged, "bf16", base=recorded)
    ids = torch.arange(24).view(2, 12)
    expected = LlamaForCausalLM.from_pretrained(merged)(ids).logits
    by_peft = AutoPeftModelForCausalLM.from_pretrained(live).eval()
    torch.testing.assert_close(by_peft(ids).logits, expected, atol=1e-2, rtol=0)
    model = LlamaForCausalLM.from_pretrained(root / "base")
    AdapterFolder(live).merge_into(model)
    assert torch.equal(model(ids).logits, expected)


def tensor_bytes(checkpoint: Path) -> int:
    """Of the tensors in a checkpoint's files, as they are on disk: adapters so small take less than their names."""
    files = (entry for path in checkpoint.glob("*.pt") for entry in zipfile.ZipFile(path).infolist())
    return sum(entry.file_size for entry in files if "/data/" in entry.filename)


def planned_bytes(spec: ModelSpec) -> float:
    """The planner's; the optimizer of these ranks, SGD, keeps the master weights alone, 4 of AdamW's 12 bytes."""
    recipe = load_recipe("tiny_base").model_copy(update={"model": spec})
    architecture = read_architecture(spec)
    zero = read_zero(recipe, hidden_size=architecture.hidden, ranks=2, ranks_per_node=2, on_cuda=False)
    return checkpoint_bytes(recipe, architecture, zero) * ADAMW.master / ADAMW.bytes_per_parameter


def check_blends(
    root: Path, kind: str, spec: ModelSpec, start: str, trained: dict[str, torch.Tensor]
) -> None:
    """Of a ZeRO-3 checkpoint: 0 and 1 are the base and the run's export, what lies between them the mean of both."""
    base, recorded = exported_weights(root / "base"), (root / start).read_text()
    blends = {
        f"of-{share}": Blend(share=share, base="base", fingerprint=recorded, run="run", step=2)
        for share in (0.0, 0.25, 1.0)
    }
    out = root / f"blends-{kind}"
    export_checkpoint(root / kind, spec, None, out, "bf16", base=recorded, blends=blends)
    written = {name: exported_weights(out / name) for name in blends}
    for name in base:
        assert torch.equal(written["of-0.0"][name], base[name])
        assert torch.equal(written["of-1.0"][name], trained[name])
        mean = 0.75 * base[name].double() + 0.25 * trained[name].double()
        # Master weights are finer than the export's bf16, in which a quarter of it is rounded, and then the mean.
        bound = 2**-8 * (0.25 * trained[name].double().abs() + mean.abs())
        assert ((written["of-0.25"][name].double() - mean).abs() <= 1.01 * bound).all(), name


def test_two_ranks_load_their_slices_train_adapters_and_export(tmp_path: Path) -> None:
    save_llama(tmp_path / "base")
    run_on_ranks(load_train_and_export, 2, str(tmp_path))
    base, loaded, merged = (exported_weights(tmp_path / name) for name in ("base", "loaded", "merged"))
    assert base.keys() == loaded.keys() == merged.keys()
    assert all(torch.equal(base[name], loaded[name]) for name in base)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "proj" in name}
    spec = ModelSpec(path=str(tmp_path / "base"), lora=LoraSpec(rank=4))
    recorded = (tmp_path / "recorded").read_text()
    export_checkpoint(tmp_path / "lora", spec, None, tmp_path / "merged-later", "bf16", base=recorded)
    export_checkpoint(
        tmp_path / "full", ModelSpec(path=str(tmp_path / "base")), None, tmp_path / "trained-later", "bf16"
    )
    for live, later in (("merged", "merged-later"), ("trained", "trained-later")):
        written = exported_weights(tmp_path / later)
        assert all(
            torch.equal(tensor, written[name]) for name, tensor in exported_weights(tmp_path / live).items()
        )
    for kind, start, live in (("lora", "recorded", "merged"), ("full", "started", "trained")):
        check_blends(
            tmp_path,
            kind,
            spec if kind == "lora" else ModelSpec(path=spec.path),
            start,
            exported_weights(tmp_path / live),
        )
    for stage in (1, 2, 3):
        lora = LoraSpec(rank=4, dropout=0.0, rslora=stage < 3)
        check_adapters(tmp_path, stage, ModelSpec(path=spec.path, lora=lora))
    with pytest.raises(UserError, match="is not a checkpoint of this model"):
        export_checkpoint(
            tmp_path / "lora", ModelSpec(path=str(tmp_path / "base")), None, tmp_path / "x", "bf16"
        )
    assert tensor_bytes(tmp_path / "lora") == pytest.approx(planned_bytes(spec), rel=0.02)
    assert tensor_bytes(tmp_path / "full") == pytest.approx(
        planned_bytes(ModelSpec(path=str(tmp_path / "base"))), rel=0.02
    )
    save_llama(tmp_path / "other", seed=6)
    other = ModelSpec(path=str(tmp_path / "other"), lora=LoraSpec(rank=4))
    with pytest.raises(UserError, match="is not the one that this checkpoint's adapters were trained on"):
        export_checkpoint(tmp_path / "lora", other, None, tmp_path / "x", "bf16", base=recorded)
    assert not (tmp_path / "x").exists()
    one_rank = build_model(spec, seed=9, ds_config=None, device="cpu")
    assert base_fingerprint(one_rank.causal_lm) == (tmp_path / "fingerprint").read_text()
