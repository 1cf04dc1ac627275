"""What the tensors of a micro-batch take in a real model, in forward and backward pass, on a CPU or on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bico_ds.attention import backends
from bico_ds.attention.kernels.aten_cuda import AtenCuda
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.table import read_spec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.build import build_objectives
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.workload import MicroBatch
from tests.planner.live_memory import LiveMemory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes alive after the forward pass, and at most before the head, within it, and in all layers."""

    after_forward: int
    before_head: int
    in_head: int
    in_layers: int


def draw_batch(
    objective: dict[str, Any], lengths: Sequence[int], spec: ModelSpec, shapes: Architecture, device: str
) -> PackedBatch:
    """A micro-batch as the loader makes it, of documents of random tokens."""
    random = np.random.default_rng()
    documents = [
        Document(token_ids=random.integers(3, shapes.vocabulary, length), source=0, id=number)
        for number, length in enumerate(lengths)
    ]
    tokens = TokenRoles(special_ids=(1, 2), placeholder_id=0, vocabulary=shapes.vocabulary)
    (built,) = build_objectives([read_spec(objective)], tokens)
    batch = built.build(Documents.of(documents), BatchKey(seed=int(random.integers(2**31)), epoch=0))
    backend = backends.resolve(
        spec.attention_backend, DTYPES[spec.dtype], shapes.head_dim, torch.device(device)
    )
    assert backend is not None
    return replace(batch, layout=build_layout(batch.plan, backend.policy))


def counts_of(batch: PackedBatch) -> MicroBatch:
    """What the planner expects of an average batch, as it is in this one."""
    plan = batch.plan
    kept = np.diff(plan.cu_seqlens.numpy()).astype(float)
    spans = np.zeros(0) if plan.span_cu_seqlens is None else np.diff(plan.span_cu_seqlens.numpy())
    span_pairs = float((spans * (spans + 1.0) / 2).sum())
    own = (kept * (kept + 1) / 2 if plan.mode == "causal" else kept**2).sum()
    return MicroBatch(
        objective="any",
        probability=1.0,
        mode=plan.mode,
        documents=plan.num_documents,
        longest=plan.max_seqlen,
        tokens=batch.represented_tokens,
        kept_rows=plan.num_kept,
        live_rows=plan.num_live,
        pairs=float(own + kept[plan.live_document.numpy()].sum()) + span_pairs,
        head_rows=len(batch.targets),
        span_pairs=span_pairs,
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def measure(model: TrainableModel, batch: PackedBatch) -> Measured:
    """One forward and backward pass; gradients of weights are dropped as they come, and do not count."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    shared = LiveMemory(model.parameters(), read=_tensors(batch))
    peaks: dict[str, int] = {}

    def restart(name: str) -> Any:
        def note(*_: Any) -> None:
            peaks[name] = shared.peak
            shared.restart()

        return note

    head = model.causal_lm.lm_head
    hooks = [
        head.register_forward_pre_hook(restart("layers")),
        head.register_forward_hook(restart("head")),
    ]
    with shared, torch.random.fork_rng(), _as_on_cuda(), _kernel_sums():
        loss = model(batch).loss
        after_forward = shared.bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Measured(
        after_forward=after_forward,
        before_head=peaks["layers"],
        in_head=peaks["head"],
        in_layers=max(peaks["layers"], shared.peak),
    )


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Inside, dropout keeps its mask on the meta device as on CUDA, in bytes (Dropout.cpp of torch)."""
    plain = nn.Dropout.forward

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if x.is_meta else plain(self, x)

    nn.Dropout.forward = forward
    try:
        yield
    finally:
        nn.Dropout.forward = plain


@contextmanager
def _kernel_sums() -> Iterator[None]:
    """Inside, the flash kernel's backward pass on the meta device holds what that of CUDA allocates (flash_api.cpp)."""
    plain = AtenCuda.backward

    def backward(self: AtenCuda, grad_out: Tensor, q: Tensor, k: Tensor, *args: Any, **settings: Any) -> Any:
        grads = plain(self, grad_out, q, k, *args, **settings)
        (N, H, D), documents = q.shape, len(settings["cu_seqlens"]) - 1
        rounded = (D + 31) // 32 * 32 if D <= 128 else (D + 63) // 64 * 64
        padded = N + 128 * documents
        held = [
            q.new_empty(padded, H, rounded, dtype=torch.float32),
            q.new_empty(H, padded, dtype=torch.float32),
        ]
        if k.shape[1] != H:
            held += [q.new_empty(N, H, D) for _ in range(2)]
        return grads

    AtenCuda.backward = backward
    try:
        yield
    finally:
        AtenCuda.backward = plain
