"""The baselines of tools/bench/gpu_baselines.py compute what we compute, and are compared in the right direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.small_model import CONFIG, random_documents, small_model
from tools.bench.baseline_batches import (
    BaselineBatch,
    ComparedModel,
    bico_padded,
    causal_packed,
    causal_rows,
)
from tools.bench.step_shapes import BICO, NTP, PLACEHOLDER


def compared(**spec: Any) -> ComparedModel:
    model = small_model(**spec)
    with torch.no_grad():  # far from uniform attention
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(20)
    return ComparedModel.around(model).train()


def loss_and_gradients(model: ComparedModel, batch: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [loss.detach(), *grads]


def assert_same(model: ComparedModel, ours: Any, theirs: BaselineBatch) -> None:
    for a, b in zip(loss_and_gradients(model, ours), loss_and_gradients(model, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))


@pytest.mark.parametrize("recompute", [0, 1])
def test_the_dense_formulation_has_our_bico_loss_and_gradients(recompute):
    model = compared(activation_checkpointing=recompute)
    ours = None
    while ours is None or not len(ours.targets):  # of ten thousand draws one masks nothing
        texts, key = random_documents(23, 7, 30)  # padded to 30
        ours = BICO.build(texts, key)
    assert_same(model, ours, bico_padded(texts, BICO.policy, key, placeholder_id=PLACEHOLDER))


@pytest.mark.parametrize("recompute", [0, 1])
def test_hugging_face_s_packing_has_our_ntp_loss_and_gradients(recompute):
    texts, key = random_documents(23, 7, 30)
    assert_same(compared(activation_checkpointing=recompute), NTP.build(texts, key), causal_packed(texts))


def test_a_document_per_row_has_our_ntp_loss_and_gradients():
    texts, key = random_documents(19, 19, 19)
    assert_same(compared(), NTP.build(texts, key), causal_rows(texts))


def test_a_baseline_is_hugging_face_s_own_model_bit_by_bit():
    model, (texts, _) = compared(), random_documents(12, 12)
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG))
    theirs.load_state_dict(model.causal_lm.state_dict())
    batch = causal_rows(texts)
    expected = theirs(input_ids=batch.input_ids, labels=batch.labels).loss * len(batch.targets)
    assert torch.equal(model(batch).loss, expected)
