"""What a load must not get away with, on one real rank: doing nothing, and one step counter for many sub-groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bico_ds.checkpoint import manifest, universal
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.checkpoint.resume import NotRestoredError, Resumption, manifest_header, restore
from bico_ds.checkpoint.state_checksums import optimizer_steps, state_checksums
from bico_ds.config.load import load_recipe
from bico_ds.config.optimizers import ADAMW
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import build_model
from bico_ds.model.weights.checksums import base_fingerprint, slice_checksum
from bico_ds.runtime.run_folder import RunFolder
from tests.distributed.model_ranks import VOCABULARY, causal_batch, ds_config, run_on_ranks

pytestmark = pytest.mark.distributed

RECIPE = load_recipe("tiny_base", [])
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip


def engine_of(seed: int, *, is_universal: bool = False, lora: bool = False) -> Any:
    import deepspeed

    config = ds_config(1) | {
        "zero_optimization": {"stage": 3, "sub_group_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "checkpoint": {"load_universal": is_universal},
    }
    spec = ModelSpec(config=TINY, dtype="fp32", lora=LoraSpec(rank=2, dropout=0.0) if lora else None)
    model = build_model(spec, seed=seed, ds_config=config, device="cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def train_step(engine: Any, seed: int) -> float:
    loss = engine(causal_batch(seed, [12, 7], 17)).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def save(engine: Any, root: Path, step: int) -> manifest.FoundCheckpoint:
    from bico_ds.runtime.distributed import Ranks

    folder = RunFolder(root)
    folder.open()
    has_base = any(not parameter.requires_grad for parameter in engine.module.parameters())
    header = {
        "layout": {"ranks": 1},
        "recipe": RECIPE.model_dump(mode="json"),
        "base": base_fingerprint(engine.module) if has_base else None,
    }
    writer = Checkpointer(
        CheckpointSpec(), folder, Ranks(0, 0, 1, torch.device("cpu")), exclude_frozen=has_base, header=header
    )
    saved = writer.save(engine, step, {})
    assert saved.failure is None
    folder.close()
    return manifest.verify(folder.checkpoints / f"step-{step:06d}")


def full_weights(rank: int, world_size: int, root: str) -> None:
    engine = engine_of(seed=1)
    for step in range(2):
        train_step(engine, step)
    assert len(engine.optimizer.fp16_groups) > 3
    found = save(engine, Path(root), 2)
    expected = [train_step(engine, seed) for seed in (2, 3)]

    idle = engine_of(seed=2)
    # Reports success, as DeepSpeed#6691.
    idle.load_checkpoint = lambda folder, tag, **_: (f"{folder}/{tag}", {})
    with pytest.raises(NotRestoredError, match="weight of causal_lm"):
        restore(idle, Resumption(found, is_universal=False), RECIPE)

    restored = engine_of(seed=2)
    restore(restored, Resumption(found, is_universal=False), RECIPE)
    restored.module.base = "what model.path names by now"
    found.content["base"] = "what the run started from"
    header = manifest_header(restored, RECIPE, {}, Resumption(found, is_universal=False))
    assert header["base"] == "what the run started from"
    assert manifest_header(restored, RECIPE, {}, None)["base"] == "what model.path names by now"
    restore(restored, Resumption(found, is_universal=False), RECIPE)
    assert [train_step(restored, seed) for seed in (2, 3)] == expected

    reported: list[str] = []
    layout = {"zero_stage": 3, "offload_optimizer": "none", "offload_param": "none"}
    found.content["layout"] |= layout
    universal.convert(found, layout, reported.append)
    assert any("converted in" in line for line in reported)
    universal.convert(found, layout, reported.append)
    assert "universal form found" in reported[-1]
    other = engine_of(seed=2, is_universal=True)
    restore(other, Resumption(found, is_universal=True), RECIPE)
    assert [train_step(other, seed) for seed in (2, 3)] == expected
    assert optimizer_steps(other) == [4], "each sub-group counts its own steps"


def adapters(rank: int, world_size: int, root: str) -> None:
    engine = engine_of(seed=1, lora=True)
    train_step(engine, 0)
    found = save(engine, Path(root), 1)
    assert found.bytes < 200_000, "the frozen base is not in the checkpoint"
    expected = train_step(engine, 1)
    restored = engine_of(seed=1, lora=True)
    restore(restored, Resumption(found, is_universal=False), RECIPE)
    assert train_step(restored, 1) == expected
    with pytest.raises(ValueError, match="the base there is not the one"):
        restore(engine_of(seed=2, lora=True), Resumption(found, is_universal=False), RECIPE)


@pytest.mark.parametrize("worker", [full_weights, adapters])
def test_a_checkpoint_restores_everything_or_is_refused(tmp_path, worker):
    run_on_ranks(worker, 1, str(tmp_path / "run"))


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def checksums_of_a_partition(rank: int, world_size: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    config = ds_config(1, stage=2) | {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    }
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_key_value_heads": 4}
    model = build_model(ModelSpec(config=TINY | shape, dtype="fp32"), seed=1, ds_config=config, device="cpu")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    partition = engine.optimizer.single_partition_of_fp32_groups[0]

    for expected_moments in ("none", "some"):
        with LargestTensor() as largest:
            found = state_checksums(engine)
        assert largest.bytes < partition.numel() * partition.element_size() / 8
        for name, parameter in model.named_parameters():
            assert found["master"][name] == slice_checksum(safe_get_full_fp32_param(parameter).view(-1), 0)
            for moment in ADAMW.moments:
                if expected_moments == "none":
                    assert found[moment][name] == 0
                else:
                    full = safe_get_full_optimizer_state(parameter, moment)
                    assert found[moment][name] == slice_checksum(full.view(-1), 0) != 0
        train_step(engine, 0)


def test_checksums_under_zero2_make_no_tensor_of_the_partition_s_size() -> None:
    run_on_ranks(checksums_of_a_partition, 1)
