"""A batch is data: all of it moves together, and nothing that reads it leaves anything behind in it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import bico_ds.attention
from bico_ds import batch as batch_module
from bico_ds.attention import backends
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import build_model
from bico_ds.native.triton_kernels import Launch
from bico_ds.objectives.abi import BlankInfilling
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising

CPU = torch.device("cpu")
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
}


MASK = MaskSpec(rate=0.4)
OBJECTIVES = {
    "bico": MaskDenoising(spec=BicoSpec(mask=MASK), placeholder_id=0),
    "abi": BlankInfilling(spec=AbiSpec(mask=MASK), special_ids=()),
}


def laid_out_batch(kind: str = "bico") -> PackedBatch:
    """A batch in fp64, for tiles and flash passes both, as a worker of the loader makes it."""
    lengths = (200, 5, 1, 40)
    rng = np.random.default_rng()
    documents = Documents.of(
        [Document(token_ids=rng.integers(5, 131, n), source=0, id=i) for i, n in enumerate(lengths)]
    )
    batch = OBJECTIVES[kind].build(documents, BatchKey(seed=int(rng.integers(2**31)), epoch=0))
    layout = build_layout(batch.plan, backends.resolve("auto", torch.float64, 16, CPU).policy)
    assert layout.tiles
    assert layout.flash
    return replace(batch, layout=layout)


def parts_of(value: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every value in a batch with its path, however deep and under whatever name it was put there."""
    children = vars(value) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else {}
    if isinstance(value, (tuple, list)):
        children = dict(enumerate(value))
    elif isinstance(value, dict):
        children = value
    yield name, value
    for key, child in children.items():
        yield from parts_of(child, f"{name}.{key}")


def tensors_of(batch: PackedBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in parts_of(batch) if isinstance(value, torch.Tensor)}


def contents(value: Any) -> tuple[type, Any]:
    """Type and contents of a tensor or number; of a container its type, as its parts are looked at one by one."""
    whole = value.tolist() if isinstance(value, torch.Tensor) else value
    return type(value), whole if isinstance(whole, (list, int, float, str)) else None


def snapshot(batch: PackedBatch) -> dict[str, tuple[type, Any]]:
    return {name: contents(value) for name, value in parts_of(batch)}


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("kept_scores", [1 << 22, 0], ids=["masks kept", "masks built at each use"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_training_step_leaves_every_bit_of_its_batch_as_it_was(
    kind, checkpointing, kept_scores, monkeypatch
):
    monkeypatch.setattr("bico_ds.attention.tiles._KEPT_SCORES", kept_scores)
    spec = ModelSpec(config=SHAPE, dtype="fp32", activation_checkpointing=checkpointing)
    model = build_model(spec, seed=1, ds_config=None, device="cpu").double().train()
    laid_out = laid_out_batch(kind)
    for batch in (laid_out, replace(laid_out, layout=None)):
        before = snapshot(batch)
        model(batch).loss.backward()
        assert snapshot(batch) == before


# They import Triton, which may be missing; a launch lives for one call, and a batch holds none.
TRITON_MODULES = {
    f"bico_ds.attention.triton.{x}" for x in ("primitives", "forward", "backward", "launches", "pass_kernels")
}


def records() -> list[type]:
    """Every dataclass of bico_ds/attention and bico_ds/batch.py."""
    walked = pkgutil.walk_packages(bico_ds.attention.__path__, "bico_ds.attention.")
    names = [module.name for module in walked if module.name not in TRITON_MODULES]
    modules = [batch_module, *map(importlib.import_module, names)]
    values = [value for module in modules for value in vars(module).values() if value is not Launch]
    return list({value: None for value in values if isinstance(value, type) and is_dataclass(value)})


def test_records_of_the_batch_and_of_attention_are_frozen_and_hold_nothing_that_can_grow():
    names = {record.__name__ for record in records()}
    assert {
        "PackedBatch",
        "AttentionPlan",
        "Layout",
        "SpanRows",
        "Tile",
        "FlashRows",
        "FusedRows",
        "Pass",
    } <= names
    for record in records():
        assert record.__dataclass_params__.frozen, record
        types = {field.name: str(field.type).lower() for field in fields(record)}
        growing = [
            name for name, type_ in types.items() if any(x in type_ for x in ("dict", "list", "set[", "any"))
        ]
        assert not growing, f"{record.__name__}: {growing}"


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_all_that_the_model_reads_moves_with_the_batch_its_layout_too(kind):
    batch = laid_out_batch(kind)
    moved = tensors_of(batch.to("meta"))
    assert moved.keys() == tensors_of(batch).keys()
    assert any(name.startswith("batch.layout.tiles") for name in moved)
    assert any(name.startswith("batch.layout.spans.layout.tiles") for name in moved) == (kind == "abi")
    devices = {name: tensor.device.type for name, tensor in moved.items()}
    assert devices.pop("batch.documents") == "cpu"
    assert set(devices.values()) == {"meta"}
    assert replace(batch, layout=None).to("meta").layout is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_is_the_same_batch_in_pinned_memory():
    batch = laid_out_batch()
    pinned = batch.pin_memory()
    assert snapshot(pinned) == snapshot(batch)
    states = {name: tensor.is_pinned() for name, tensor in tensors_of(pinned).items() if tensor.numel()}
    assert not states.pop("batch.documents")
    assert all(states.values()), states
