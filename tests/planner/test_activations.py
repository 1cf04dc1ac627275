"""The planner's activations are what a real model keeps and makes: bytes of live tensors, counted operation by operation.

On a CPU the model runs as in training; what CUDA would run is run on the meta device, where autograd keeps what it keeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bico_ds.config.schema import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.planner.activations import activation_memory
from bico_ds.planner.architecture import architecture_of
from bico_ds.planner.items import total
from tests.planner.measured_rows import counts_of, draw_batch, measure

ALL = LoraSpec().targets
NTP: dict[str, Any] = {"kind": "ntp"}
BICO: dict[str, Any] = {"kind": "bico"}
MANY_LIVE: dict[str, Any] = {"kind": "bico", "mask": {"rate": 0.6}}


def random_spec(rng: np.random.Generator, **values: Any) -> ModelSpec:
    """A model of 3 to 5 layers whose sizes are in usual proportions; `family` and the spec's own keys are given."""
    family = values.pop("family", "llama")
    key_heads, head_dim = int(rng.integers(1, 4)), 8 * int(rng.integers(2, 7))
    heads = key_heads * int(rng.integers(1, 5))
    hidden = heads * head_dim
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": int(hidden * rng.uniform(2.5, 4)),
        "num_hidden_layers": int(rng.integers(3, 6)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "vocab_size": int(rng.integers(300, 1000)),
    }
    return ModelSpec(config=config, **{"loss_chunk_rows": int(rng.integers(50, 300))} | values)


def built(spec: ModelSpec, device: str) -> TrainableModel:
    return build_model(spec, seed=1, ds_config=None, device=device, longest_document=4000).train()


def compare(spec: ModelSpec, objective: dict[str, Any], device: str, *, within: float, **how: Any) -> None:
    """Plan and run one random micro-batch; bytes in the head and in the backward pass must agree."""
    rng = np.random.default_rng()
    assert spec.config is not None
    shapes = architecture_of(spec.config, source="model.config")
    batch = draw_batch(objective, rng.integers(150, 900, int(rng.integers(2, 5))), spec, shapes, device)
    plan = activation_memory(shapes, spec, counts_of(batch), on_cuda=device != "cpu", **how)
    found = measure(built(spec, device), batch.to(device))
    for name, items, bytes_found in (
        ("head", plan.in_head, found.in_head),
        ("backward", plan.in_layer, found.in_backward),
    ):
        planned = total((*plan.kept, *items))
        says = f"{name}: planned {planned}, found {bytes_found}; {spec}; {batch.plan.outline}"
        assert planned.low * (1 - within) <= bytes_found <= planned.high * (1 + within), says


LORA = {"dropout": LoraSpec(rank=5, dropout=0.1), "no dropout": LoraSpec(rank=5, dropout=0.0)}


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("objective", [NTP, BICO, MANY_LIVE], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_keeps_and_makes_what_is_planned(dtype, objective, recompute):
    spec = random_spec(np.random.default_rng(), dtype=dtype, activation_checkpointing=recompute)
    compare(spec, objective, "cpu", within=0.02)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("adapters", LORA)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_with_adapters_keeps_and_makes_what_is_planned(dtype, adapters, recompute):
    rng = np.random.default_rng()
    spec = random_spec(rng, dtype=dtype, lora=LORA[adapters], activation_checkpointing=recompute)
    compare(spec, BICO, "cpu", within=0.04)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("objective", [NTP, BICO], ids=str)
def test_what_cuda_runs_keeps_and_makes_what_is_planned(objective, recompute):
    spec = random_spec(np.random.default_rng(), activation_checkpointing=recompute)
    compare(spec, objective, "meta", within=0.03)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("adapters", LORA)
def test_what_cuda_runs_with_adapters_keeps_and_makes_what_is_planned(adapters, recompute):
    rng = np.random.default_rng()
    spec = random_spec(rng, lora=LORA[adapters], activation_checkpointing=recompute)
    compare(spec, NTP, "meta", within=0.05)
