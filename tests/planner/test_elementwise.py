"""What a step reads and writes beside its products is what its real operations do: every input once, every result once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.attention import backends
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.elementwise_kernels import StatedKernels
from bico_ds.native.library import native_refusal
from bico_ds.objectives.abi import BlankInfilling
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.compute.elementwise import NORM_PROGRAMS, elementwise_bytes, optimizer_bytes
from tests.bench.small_model import random_documents
from tests.planner.test_flops import META, OBJECTIVES, TORCH_NAMES, counts
from tools.bench.count_operations import FLASH, PRODUCTS, Operations


def moved(model: TrainableModel, batch: PackedBatch) -> int:
    with Operations() as operations:
        model(batch).loss.backward()
    return operations.total(without=(*PRODUCTS, *FLASH)).bytes


LAYERS = {"vocab_size": 100, "num_hidden_layers": 3}
HEAD = {"vocab_size": 60_000, "num_hidden_layers": 1}
LORA = {"rank": 8, "dropout": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "layers": {"config": LAYERS},
    "layers in fp32": {"config": LAYERS, "dtype": "fp32"},
    "layers, recomputed": {"config": LAYERS, "activation_checkpointing": 2},
    "adapters": {"config": LAYERS, "lora": LORA},
    "adapters of some": {"config": LAYERS, "lora": {**LORA, "targets": ["q_proj", "down_proj"]}},
    "norms of q and k": {"config": {**LAYERS, "model_type": "qwen3"}},
    "a named kernel, with tiles": {"config": LAYERS, "attention_backend": "aten-cuda"},
    "the Triton kernels alone": {"config": LAYERS, "attention_backend": "triton"},
    "head": {"config": HEAD},
    "head in fp32": {"config": HEAD, "dtype": "fp32"},
    "tied head, its gradient by vocabulary": {
        "config": {**HEAD, "tie_word_embeddings": True},
        "loss_chunk_rows": 8,
    },
}
SHAPE = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
# Of spans as long as a document: of short ones tiles are padded, and spans of one row are not told apart.
WITH_SPANS = {
    **OBJECTIVES,
    "abi": BlankInfilling(spec=AbiSpec(mask=MaskSpec(rate=0.7), spans="left_to_right"), special_ids=()),
}


def problem(device: str, objective: str, variant: str) -> tuple[ModelSpec, TrainableModel, PackedBatch]:
    values = {"dtype": "bf16", **VARIANTS[variant]}
    spec = ModelSpec.model_validate({**values, "config": {**SHAPE, **values["config"]}})
    model = build_model(spec, seed=1, ds_config=None, device=device).train()
    batch = WITH_SPANS[objective].build(*random_documents(*np.random.default_rng().integers(800, 1100, 1)))
    batch.input_ids.remainder_(spec.config["vocab_size"])
    batch.targets.remainder_(spec.config["vocab_size"])
    dtype = getattr(torch, TORCH_NAMES[spec.dtype])
    policy = backends.resolve(spec.attention_backend, dtype, 64, torch.device(device)).policy
    return spec, model, replace(batch, layout=build_layout(batch.plan, policy))


@pytest.mark.parametrize("objective", WITH_SPANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_moves_what_is_expected(variant, objective):
    """Of one document: tiles of several are padded, which is not counted."""
    spec, model, batch = problem("meta", objective, variant)
    expected = sum(elementwise_bytes(read_architecture(spec), spec, counts(batch)).values())
    found = moved(model, batch.to(META))
    assert expected == pytest.approx(found, rel=0.05)


@pytest.mark.skipif(native_refusal() is not None, reason=f"the fused kernels: {native_refusal()}")
@pytest.mark.parametrize("objective", WITH_SPANS)
@pytest.mark.parametrize("variant", ["layers", "head"])
def test_a_cpu_moves_what_is_expected(variant, objective):
    spec, model, batch = problem("cpu", objective, variant)
    expected = sum(elementwise_bytes(read_architecture(spec), spec, counts(batch), on_cuda=False).values())
    found = moved(model, batch)
    assert expected == pytest.approx(found, rel=0.05)


def test_an_update_moves_what_the_formula_by_hand_says():
    """In bf16 per element: 4 B into the bucket; 18 B cast and added; 48 B of norm, clipping and Adam, 6 B cast."""
    spec = ModelSpec.model_validate({"config": SHAPE})
    assert optimizer_bytes(1000, spec, partition=10, micro_batches=3) == 3 * (4 * 1000 + 18 * 10) + 54 * 10


def test_the_programs_of_a_norm_are_those_that_its_kernels_state():
    assert NORM_PROGRAMS == StatedKernels._PROGRAMS
