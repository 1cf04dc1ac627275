"""The start model inside the one in training: its adapters switched off."""

from __future__ import annotations

from dataclasses import replace

import torch

from bico_ds.attention.plan import build_plan
from bico_ds.batch import ComparedRows, PackedBatch
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.checksums import base_fingerprint
from tests.model.tiny_llama import ARCHITECTURE

DROPS = LoraSpec(rank=4, dropout=0.5)


def built(lora: LoraSpec | None = DROPS) -> TrainableModel:
    spec = ModelSpec(
        config={"model_type": "llama", **ARCHITECTURE}, dtype="fp32", lora=lora, activation_checkpointing=1,
        loss_chunk_rows=3,
    )  # fmt: skip
    return build_model(spec, seed=1, ds_config=None, device="cpu").train()


def batch(compared: int | None, mode: str = "causal") -> PackedBatch:
    """13 tokens in two documents, 8 of them with targets, the first `compared` of which are compared."""
    return PackedBatch(
        input_ids=torch.randint(0, 101, (13,)),
        position_ids=torch.cat([torch.arange(9), torch.arange(4)]),
        plan=build_plan(mode, kept_lengths=[9, 4]),  # type: ignore[arg-type]
        loss_rows=torch.arange(8),
        targets=torch.randint(0, 101, (8,)),
        represented_tokens=13,
        documents=torch.zeros(2, 3, dtype=torch.int64),
        compared=None if compared is None else ComparedRows(index=torch.arange(compared)),
    )


def trained_gradients(model: TrainableModel, total: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))


def moved(model: TrainableModel) -> TrainableModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_fresh_adapters_diverge_by_exactly_nothing_and_nothing_pulls_them() -> None:
    model = built()
    losses = model(batch(8))
    assert losses.divergence.item() == 0.0
    assert not any(gradient.any() for gradient in trained_gradients(model, losses.divergence))


def test_whatever_the_adapters_became_the_start_model_is_the_plain_one() -> None:
    """Bit by bit, in spite of dropout and recomputation; and the pass that is trained is as without it."""
    model, plain, given = moved(built()), built(None), batch(8)
    before = base_fingerprint(model.causal_lm)
    start = model._start_model(given, torch.arange(2, 6))
    assert torch.equal(start, plain._hidden(given)[2:6]) and not start.requires_grad
    found = []
    for compared in (given, replace(given, compared=None)):
        torch.manual_seed(3)
        losses = model(compared)
        found.append([losses.loss.detach(), *trained_gradients(model, losses.loss)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert base_fingerprint(model.causal_lm) == before


def test_the_divergence_and_its_pull_are_those_of_two_plain_models() -> None:
    model, plain, given = moved(built(replace_dropout(0.0))), built(None), batch(5)
    p, q = (part._hidden(given)[:5] @ part.causal_lm.lm_head.weight.T for part in (plain, model))
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    ours = model(given).divergence
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    gradients = zip(trained_gradients(model, ours), trained_gradients(model, expected), strict=True)
    assert expected > 0.01
    for gradient, other in gradients:
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def replace_dropout(dropout: float) -> LoraSpec:
    return DROPS.model_copy(update={"dropout": dropout})


def test_steps_that_compare_nothing_run_no_start_model_and_causal_ones_without_a_row_do() -> None:
    model, passes = moved(built()), []
    model.causal_lm.model.norm.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    bidirectional = model(batch(None, "bidirectional"))
    assert (
        passes == [True]
        and bidirectional.divergence.item() == 0.0
        and not bidirectional.divergence.requires_grad
    )
    passes.clear()
    none = model(batch(0))
    assert passes == [False, True] and none.divergence.item() == 0.0
    assert not any(gradient.any() for gradient in trained_gradients(model, none.divergence))
