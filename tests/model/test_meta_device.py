"""Llama-3-8B's shape with real autograd and no memory: on the meta device, as it would run on a GPU.

The GPU path of attention runs up to the kernels, whose place torch's shape functions take.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bico_ds.attention import backends
from bico_ds.attention.layout import CUDA_POLICY, build_layout
from bico_ds.attention.packed import _PackedAttention
from bico_ds.batch import PackedBatch
from bico_ds.common.traffic import counting_traffic
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.table import KINDS, read_spec
from bico_ds.config.sections.model import LoraSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.elementwise_kernels import without_kernels
from bico_ds.model.head import _ChunkedCrossEntropy
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.build import build_objectives
from tests.attention.gpu_kernels import PACKAGES
from tests.model.device_watch import checked_gradients, no_host_work
from tests.planner.live_memory import LiveMemory

META = torch.device("meta")
HEAD_DIM = 128
# Long ones, one for hidden keys, and as short as they come.
LENGTHS = [1500, 700, 1, 2, 40, 333]
NEWEST = {package.distribution: package for package in PACKAGES}  # their files are sorted by version
OBJECTIVES = [
    {"kind": "ntp"},
    {"kind": "bico"},
    {"kind": "bico", "mask": {"rate": 0.6}},  # many live rows
    *({"kind": kind} for kind in KINDS if kind not in ("ntp", "bico")),
]


def model_of(*, layers: int = 2, **values: Any) -> TrainableModel:
    spec = load_recipe("llama3_8b_bico").model
    config = spec.config | {"num_hidden_layers": layers} | values.pop("config", {})
    spec = spec.model_copy(update={"path": None, "config": config, "loss_chunk_rows": 512} | values)
    return build_model(spec, seed=1, ds_config=None, device=META).train()


def batch_of(objective: dict[str, Any], backend: str = "auto") -> PackedBatch:
    """As the loader's worker makes it, then moved."""
    random = np.random.default_rng()
    documents = [
        Document(
            token_ids=random.integers(3, 1000, length),
            source=0,
            id=number,
            word_starts=random.random(length) < 0.5,
        )
        for number, length in enumerate(LENGTHS)
    ]
    tokens = TokenRoles(special_ids=(1, 2), placeholder_id=0, vocabulary=128_256)
    (built,) = build_objectives([read_spec(objective)], tokens)
    batch = built.build(Documents.of(documents), BatchKey(seed=int(random.integers(2**31)), epoch=0))
    policy = backends.resolve(backend, torch.bfloat16, HEAD_DIM, META).policy
    return replace(batch, layout=build_layout(batch.plan, policy)).to(META)


def run(model: TrainableModel, batch: PackedBatch) -> Tensor:
    """Forward and backward under watch; checks what goes from layer to layer, and what runs again in the backward pass."""
    rows, width = len(batch.input_ids), model.config.hidden_size

    def check_hidden(module: Any, args: Any, out: tuple[Tensor, Tensor]) -> None:
        assert [(x.shape, x.dtype) for x in out] == 2 * [((1, rows, width), torch.bfloat16)]

    assert model.causal_lm.config.dtype == torch.bfloat16
    hooks = [layer.register_forward_hook(check_hidden) for layer in model.causal_lm.model.layers]
    functions = [_PackedAttention, _ChunkedCrossEntropy]
    with no_host_work(), checked_gradients(functions) as ran, counting_traffic() as calls:
        loss = model(batch).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    layers, every = len(hooks), model.recompute_every
    recomputed = len(range(0, layers, every)) if every else 0
    assert ran == {
        "_PackedAttention.forward": layers + recomputed,
        "_PackedAttention.backward": layers,
        "_ChunkedCrossEntropy.forward": 1,
        "_ChunkedCrossEntropy.backward": 1,
    }
    chunks = -(-len(batch.targets) // model.causal_lm.lm_head.chunk_rows)
    assert [call.op for call in calls].count("head cross entropy") == chunks
    return loss


def check_gradients(model: TrainableModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.bfloat16), name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "aten-cuda", "triton", *NEWEST])
def test_every_objective_runs_by_every_gpu_kernel(objective, backend, tmp_path):
    with ExitStack() as stack:
        if backend in NEWEST:
            stack.enter_context(NEWEST[backend].installed(tmp_path))
        model = model_of(activation_checkpointing=0, attention_backend=backend)
        loss = run(model, batch_of(objective, backend))
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, META)
    check_gradients(model)


VARIANTS = {
    "checkpointing": {"activation_checkpointing": 1},
    "lora": {"lora": LoraSpec(dropout=0.1), "activation_checkpointing": 0},
    "lora with checkpointing": {"lora": LoraSpec(dropout=0.1), "activation_checkpointing": 1},
    "tied head": {"config": {"tie_word_embeddings": True}, "activation_checkpointing": 0},
    "norms of q and k": {
        "config": {"model_type": "qwen3", "head_dim": HEAD_DIM},
        "activation_checkpointing": 2,
    },
    "gradients by vocabulary": {"loss_chunk_rows": 16},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=str)
def test_every_variant_of_the_model_runs(objective, variant):
    model = model_of(**VARIANTS[variant])
    loss = run(model, batch_of(objective))
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, META)
    check_gradients(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) == variant.startswith("lora")
    tied = model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight
    assert tied == (variant == "tied head")


def test_the_recipe_of_llama_3_8b_runs_with_all_its_layers():
    model = model_of(layers=32)
    assert model.recompute_every == 1 and sum(p.numel() for p in model.parameters()) > 8e9
    run(model, batch_of({"kind": "bico"}))
    check_gradients(model)


@pytest.mark.parametrize("kernels", [True, False], ids=["our norms", "Hugging Face's norms"])
@pytest.mark.parametrize("lora", [None, LoraSpec(dropout=0.1)], ids=["all weights", "adapters"])
def test_a_checkpointed_layer_keeps_the_sum_alone(kernels, lora):
    """And, of our norm, four bytes per row."""
    batch, alive = batch_of({"kind": "bico"}), []
    for layers in (3, 4):
        model = model_of(layers=layers, activation_checkpointing=1, lora=lora)
        memory = LiveMemory(model.parameters())
        with nullcontext() if kernels else without_kernels():
            with memory:
                loss = model(batch).loss
                alive.append(memory.bytes)
            loss.backward()
    rows = len(batch.input_ids)
    assert alive[1] - alive[0] == rows * (2 * model.config.hidden_size + 4 * kernels)


def test_norms_and_gates_move_what_is_counted_by_hand():
    """Of three recomputed layers. A pass over rows is T x E, or T x F in the gate; a norm of a sum makes it, too."""
    model, batch, layers = model_of(layers=3, activation_checkpointing=1), batch_of({"kind": "bico"}), 3
    with counting_traffic() as calls:
        run(model, batch)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for call in calls:
        found[call.op] += Counter(calls=1, launches=call.launches, bytes=call.bytes_read + call.bytes_written)
    rows, wide = (2 * len(batch.input_ids) * n for n in (model.config.hidden_size, 14336))
    roots, weight = 4 * len(batch.input_ids), 2 * model.config.hidden_size
    # Alone: the first norm of the first layer, and of each recomputed one. Of a sum: all others, the second ones twice.
    alone, summed = layers + 1, 3 * layers
    assert found["norm forward"] == {
        "calls": alone + summed,
        "launches": alone + summed,
        "bytes": alone * (2 * rows) + summed * (4 * rows) + (alone + summed) * (roots + weight),
    }
    # Only the first and the last norm have no gradient of a sum to add; their gradient is cleared before it is written.
    # The weight's has 132 parts in fp32, written and read, then summed and cast.
    parts = 2 * 132 * 2 * weight + 2 * 2 * weight + weight
    assert found["norm backward"] == {
        "calls": 2 * layers + 1,
        "launches": 3 * (2 * layers + 1) + 2,
        "bytes": (2 * layers + 1) * (4 * rows + roots + weight + parts),
    }
    assert found["gate forward"] == {
        "calls": 2 * layers,
        "launches": 2 * layers,
        "bytes": 2 * layers * 3 * wide,
    }
    assert found["gate backward"] == {"calls": layers, "launches": layers, "bytes": layers * 5 * wide}


def test_live_rows_run_as_hidden_keys(monkeypatch):
    """Where a machine's policy has them so."""
    monkeypatch.setattr(backends, "CUDA_POLICY", replace(CUDA_POLICY, tile_cost=1e9))
    backends.resolve.cache_clear()
    try:
        model = model_of(attention_backend="aten-cuda")
        batch = batch_of({"kind": "bico"}, "aten-cuda")
        assert sorted(group.hidden is None for group in batch.layout.flash) == [False, True]
        run(model, batch)
    finally:
        backends.resolve.cache_clear()
    check_gradients(model)


def test_these_batches_reach_the_flash_kernel_alone_live_rows_in_blocks_and_tiles():
    layouts = [batch_of(objective).layout for objective in OBJECTIVES]
    assert any(layout.is_one_flash_problem for layout in layouts)
    assert any(layout.flash and layout.blocks for layout in layouts)
    named = [batch_of(objective, "aten-cuda").layout for objective in OBJECTIVES]
    assert any(layout.flash and layout.tiles for layout in named)


X, ROWS, CHOSEN = (
    torch.ones(4, 2, device=META),
    torch.ones(4, dtype=torch.int64, device=META),
    torch.ones(4) > 0,
)
FORBIDDEN = {
    "item": lambda: X.sum().item(),
    "tolist": lambda: ROWS.tolist(),
    "if": lambda: 1 if X.any() else 0,
    "rows of a mask": lambda: X[CHOSEN.to(META)],
    "write by a mask": lambda: X.clone().__setitem__(CHOSEN.to(META), 0.0),
    "nonzero": lambda: X.nonzero(),
    "unique": lambda: ROWS.unique(),
    "repeats": lambda: X.repeat_interleave(ROWS, dim=0),
    "masked_select": lambda: X.masked_select(X > 0),
    "to the host": lambda: X.cpu(),
    "from the host": lambda: torch.ones(4).to(META),
    "numbers of the host": lambda: torch.tensor([1, 2], device=META),
    "a factor on the host": lambda: X * torch.ones(()),
    "an index on the host": lambda: X[CHOSEN.long()],
    "work on the host": lambda: torch.arange(3),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_watch_refuses(what):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_host_work():
        FORBIDDEN[what]()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_watch_refuses_it_in_a_backward_pass(what):
    class DoesItBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            FORBIDDEN[what]()
            return grad

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_host_work():
        DoesItBackward.apply(X.clone().requires_grad_()).sum().backward()


def test_the_watch_lets_pass_what_a_gpu_does_by_itself():
    with no_host_work():
        X[ROWS]
        X.index_select(0, ROWS).masked_fill(X > 0, 1.0).to(torch.bfloat16).sum()


def test_a_gradient_of_another_dtype_than_its_input_is_refused(monkeypatch):
    """Autograd would cast it."""
    backward = _PackedAttention.backward
    promoted = lambda ctx, grad: tuple(g if g is None else g.float() for g in backward(ctx, grad))  # noqa: E731
    monkeypatch.setattr(_PackedAttention, "backward", staticmethod(promoted))
    with pytest.raises(AssertionError, match="_PackedAttention.*float32, not .*bfloat16"):
        run(model_of(), batch_of({"kind": "ntp"}))
