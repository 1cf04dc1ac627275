"""What a step reads and writes beside its products is what its real operations do: every input once, every result once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bico_ds.attention import backends
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.config.schema import ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.native.library import native_refusal
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.compute.elementwise import elementwise_bytes, optimizer_bytes
from tests.bench.small_model import random_documents
from tests.planner.test_flops import META, OBJECTIVES, TORCH_NAMES, counts

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_flash_attention_forward", "_flash_attention_backward"}


def size(x: Tensor) -> int:
    """Bytes, a broadcast dimension counted once."""
    return x.element_size() * int(
        np.prod([n for n, step in zip(x.shape, x.stride(), strict=True) if step], dtype=np.int64)
    )


class Traffic(TorchDispatchMode):
    """Adds up what operations beside products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op._schema.name.split("::")[1]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if (
            name not in PRODUCTS
            and not is_view
            and not name.startswith(("empty", "new_empty", "_unsafe_view"))
        ):
            self.bytes += _moved(name, args, kwargs, result)
        return result


def _moved(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation touches; of an indexed one, only those of the rows that it takes."""
    written = sum(size(x) for x in tree_leaves(result) if isinstance(x, Tensor))
    if name in ("embedding", "index_select", "gather"):
        return 2 * written
    if name in ("zeros", "new_zeros", "zeros_like"):
        return written
    if name == "copy_":
        return size(args[0]) + size(args[1])
    if name in ("index_copy_", "index_add_", "scatter_add_"):
        return (2 if name == "index_copy_" else 3) * size(args[3])
    if name == "embedding_dense_backward":
        return written + 3 * size(args[0])
    given = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
    return written + sum(size(x) for x in given if isinstance(x, Tensor))


def moved(model: TrainableModel, batch: PackedBatch) -> int:
    with Traffic() as traffic:
        model(batch).loss.backward()
    return traffic.bytes


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


def problem(device: str, objective: str, variant: str) -> tuple[ModelSpec, TrainableModel, PackedBatch]:
    values = {"dtype": "bf16", **VARIANTS[variant]}
    spec = ModelSpec.model_validate({**values, "config": {**SHAPE, **values["config"]}})
    model = build_model(spec, seed=1, ds_config=None, device=device).train()
    batch = OBJECTIVES[objective].build(*random_documents(*np.random.default_rng().integers(800, 1100, 1)))
    batch.input_ids.remainder_(spec.config["vocab_size"])
    batch.targets.remainder_(spec.config["vocab_size"])
    policy = backends.resolve(
        "auto", getattr(torch, TORCH_NAMES[spec.dtype]), 64, torch.device(device)
    ).policy
    return spec, model, replace(batch, layout=build_layout(batch.plan, policy))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_moves_what_is_expected(variant, objective):
    """Of one document: tiles of several are padded, which is not counted."""
    spec, model, batch = problem("meta", objective, variant)
    expected = elementwise_bytes(read_architecture(spec), spec, counts(batch))
    found = moved(model, batch.to(META))
    assert expected == pytest.approx(found, rel=0.08)


@pytest.mark.skipif(native_refusal() is not None, reason=f"the fused kernels: {native_refusal()}")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variant", ["layers", "head"])
def test_a_cpu_moves_what_is_expected(variant, objective):
    spec, model, batch = problem("cpu", objective, variant)
    expected = elementwise_bytes(read_architecture(spec), spec, counts(batch), on_cuda=False)
    found = moved(model, batch)
    assert expected == pytest.approx(found, rel=0.08)


def test_an_update_moves_what_the_formula_by_hand_says():
    """In bf16 per element: 4 B into the bucket; 18 B cast and added; 48 B of norm, clipping and Adam, 6 B cast."""
    spec = ModelSpec.model_validate({"config": SHAPE})
    assert optimizer_bytes(1000, spec, partition=10, micro_batches=3) == 3 * (4 * 1000 + 18 * 10) + 54 * 10
