"""What two ranks send each other in an optimizer step is what the planner says, counted at DeepSpeed's own interface."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.model.build import build_model
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.communication import transfers
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.runtime.ds_config import build_ds_config
from tests.distributed.model_ranks import VOCABULARY, causal_batch, run_on_ranks

pytestmark = pytest.mark.distributed

ACCUMULATION, RANKS = 2, 2
# By what the planner calls it, DeepSpeed's collective, and how often a rank sends its payload: (n - 1) / n of it, an
# all-reduce twice.
COLLECTIVES = {"all_gather_into_tensor": 0.5, "reduce_scatter_tensor": 0.5, "all_reduce": 1.0}
KIND = {"gathered": "all_gather_into_tensor", "scattered": "reduce_scatter_tensor", "reduced": "all_reduce"}
# DeepSpeed also sums norms and flags.
SMALLEST = 64
# `live`: how many layers' weights may be there at a time. DeepSpeed's 1e9 elements are 1.17 layers of a 70B model.
CASES = {
    "ZeRO-2": {"config": "zero2_bf16"},
    "ZeRO-2, adapters": {"config": "zero2_bf16", "lora": True},
    "ZeRO-3": {"config": "zero3_bf16", "live": 1.17},
    "ZeRO-3, everything stays": {"config": "zero3_bf16", "live": 100},
    "ZeRO-3, checkpointing": {"config": "zero3_bf16", "live": 1.17, "every": 1},
    "ZeRO-3, adapters and checkpointing": {"config": "zero3_bf16", "live": 1.17, "every": 1, "lora": True},
}


def recipe_of(shape: dict[str, int], case: dict[str, Any]) -> Recipe:
    """A small model with buckets and limits of a large one."""
    settings = [
        f"model.config.vocab_size={VOCABULARY}", "model.config.num_attention_heads=4", "model.config.head_dim=16",
        "model.config.num_key_value_heads=2", "model.dtype=bf16", "training.micro_batch_bins=1",
        f"training.global_batch_bins={ACCUMULATION * RANKS}", f"deepspeed.config={case['config']}",
        f"model.activation_checkpointing={case.get('every', 0)}",
        *(f"model.config.{key}={size}" for key, size in shape.items()),
    ]  # fmt: skip
    if case.get("lora"):
        settings.append("model.lora={rank: 4, alpha: 8, dropout: 0.0}")
    if "live" in case:
        layer = read_architecture(load_recipe("tiny_base", settings).model).layer_parameters
        zero = "deepspeed.overrides.zero_optimization.stage3_"
        most = int(case["live"] * layer)
        settings += [f"{zero}max_live_parameters={most}", f"{zero}max_reuse_distance={most}"]
        # As in large models a bucket holds a square weight.
        settings.append(f"{zero}prefetch_bucket_size={int(0.9 * shape['hidden_size'] ** 2)}")
    return load_recipe("tiny_base", settings)


def count_sent(counts: Counter[str]) -> None:
    """Add the bytes that this rank sends, whenever DeepSpeed calls its backend."""
    from deepspeed.comm import comm

    def counted(name: str, share: float, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            payload = max(tensor.nbytes for tensor in tensors)
            if payload > SMALLEST:
                counts[name] += share * payload
            return function(*args, **kwargs)

        return call

    for name, share in COLLECTIVES.items():
        setattr(comm.cdb, name, counted(name, share, getattr(comm.cdb, name)))


def train(rank: int, world_size: int, folder: str, shape: dict[str, int]) -> None:
    """Each case for three steps; the last one is counted, when the order of modules is known."""
    import deepspeed

    counts: Counter[str] = Counter()
    count_sent(counts)
    found = {}
    for name, case in CASES.items():
        recipe = recipe_of(shape, case)
        config = build_ds_config(
            recipe,
            world_size=world_size,
            hidden_size=shape["hidden_size"],
            on_cuda=False,
            run_folder=Path(folder),
        )
        model = build_model(recipe.model, seed=1, ds_config=config, device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        for step in range(3):
            counts.clear()
            for number in range(ACCUMULATION):
                loss = engine(causal_batch(10 * step + number, [20, 12], 20)).loss
                engine.backward(loss, scale_wrt_gas=False)
                engine.step()
        found[name] = dict(counts)
    if rank == 0:
        (Path(folder) / "sent.json").write_text(json.dumps(found))


def planned(shape: dict[str, int], case: dict[str, Any]) -> dict[str, float]:
    recipe = recipe_of(shape, case)
    architecture = read_architecture(recipe.model)
    zero = read_zero(
        recipe, hidden_size=shape["hidden_size"], ranks=RANKS, ranks_per_node=RANKS, on_cuda=False
    )
    deployment = Deployment(device=DEVICES["l4"], nodes=1, ranks_per_node=RANKS, zero=zero)
    sums: Counter[str] = Counter()
    for transfer in transfers(recipe, architecture, deployment):
        (kind,) = (KIND[word] for word in KIND if word in transfer.name)
        sums[kind] += transfer.bytes
    return dict(sums)


@pytest.mark.slow
def test_ranks_send_what_is_planned(tmp_path):
    layers = int(np.random.default_rng().integers(3, 6))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    run_on_ranks(train, RANKS, str(tmp_path), shape)
    sent = json.loads((tmp_path / "sent.json").read_text())
    for name, case in CASES.items():
        expected = planned(shape, case)
        assert sent[name].keys() == expected.keys(), name
        for kind, size in expected.items():
            assert sent[name][kind] == pytest.approx(size, rel=0.02), (name, kind, shape)
