"""The loss of a step is one weighted mean, however its targets are spread over ranks and micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing._internal.distributed import multi_threaded_pg

from bico_ds.batch import PackedBatch
from bico_ds.model.head import Losses, LossHead
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.micro_batches import name_worst
from bico_ds.training.step_totals import AgreedStep, add_up, agree
from bico_ds.training.trainer import Trainer
from tests.distributed.model_ranks import VOCABULARY, causal_batch
from tests.distributed.test_many_ranks import on_threads

pytestmark = pytest.mark.skipif(
    not hasattr(multi_threaded_pg.ThreadLocalWorld, "comms"),
    reason="this torch's threaded process group cannot be destroyed (2.11)",
)

RANKS, SIZE = 3, 8


class Embedded(nn.Module):
    """A row's hidden state is its token's embedding, and the head is the model's own; in fp64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, SIZE, generator=generator, dtype=torch.float64))
        self.head = LossHead(SIZE, VOCABULARY, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(self.embedding.flip(0))
        self.head.chunk_rows = 3

    def forward(self, batch: PackedBatch) -> Losses:
        hidden = self.embedding[batch.input_ids[batch.loss_rows]]
        return self.head(hidden, batch.targets, None, batch.loss_weights)


class Accumulating:
    """Gradients of all micro-batches add up in the model's parameters."""

    def __init__(self) -> None:
        self.module = Embedded()

    def __call__(self, batch: PackedBatch) -> Losses:
        return self.module(batch)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None: ...

    def get_lr(self) -> list[float]:
        return [0.0]


def batches_of(rank: int, weighs: bool) -> list[PackedBatch]:
    """Two micro-batches; the last rank has no target."""
    draw = np.random.default_rng([5, rank])
    rows = [0, 0] if rank == RANKS - 1 else draw.integers(1, 13, 2).tolist()
    batches = [causal_batch(2 * rank + number, [9, 4], count) for number, count in enumerate(rows)]
    if not weighs:
        return batches
    weights = [torch.from_numpy(draw.uniform(0.05, 2.0, count)).float() for count in rows]
    return [replace(batch, loss_weights=own) for batch, own in zip(batches, weights, strict=True)]


def one_step(rank: int, weighs: bool) -> tuple[float, float | None, list[Tensor | None]]:
    """The reported loss, the reported weight and the gradients of one rank, by the trainer's own step."""
    run: Any = SimpleNamespace(
        ranks=Ranks(rank=rank, local_rank=rank, world_size=RANKS, device=torch.device("cpu")),
        recipe=SimpleNamespace(seed=1, retention=None),
        stop=False,
    )
    engine, sources = Accumulating(), SimpleNamespace(sources=("a",))
    trainer: Any = SimpleNamespace(run=run, engine=engine, step=0, consumed=sources)
    trainer._source_losses = lambda totals: Trainer._source_losses(trainer, totals)
    step: Any = SimpleNamespace(batches=batches_of(rank, weighs), objective="mine", fill=1.0)
    agreed: AgreedStep = agree(step, run)
    found = Trainer._forward_backward(trainer, step.batches, agreed.counts)
    totals = add_up(step.batches, found, run, sources=1, wait_seconds=0.0, norm_before=None, following=None)
    report = Trainer._report_of(trainer, agreed, totals)
    return report.loss, report.weight, [parameter.grad for parameter in engine.module.parameters()]


@pytest.mark.parametrize("weighs", [True, False])
def test_a_step_on_ranks_follows_the_weighted_mean_over_all_their_targets(weighs):
    found = on_threads(RANKS, lambda rank: one_step(rank, weighs))
    model, total, weight = Embedded(), torch.zeros(()), 0.0
    for batch in (batch for rank in range(RANKS) for batch in batches_of(rank, weighs)):
        logits = model.embedding[batch.input_ids[batch.loss_rows]] @ model.head.weight.T
        each = cross_entropy(logits, batch.targets, reduction="none")
        weights = torch.ones(len(each)) if batch.loss_weights is None else batch.loss_weights
        total, weight = total + (weights * each).sum(), weight + float(weights.double().sum())
    (total / weight).backward()
    for loss, of_all, _ in found:
        assert (loss, of_all) == pytest.approx((total.item() / weight, weight), rel=1e-9)
    # DeepSpeed averages over the ranks.
    means = [sum(parts) / RANKS for parts in zip(*(gradients for *_, gradients in found), strict=True)]
    for gradient, expected in zip(means, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-9, atol=1e-12)


def test_the_micro_batch_with_the_largest_weighted_mean_is_named_and_kept_with_its_weights(tmp_path: Path):
    """Its sum is the smaller one, and its mean over targets, too."""
    heavy, light = causal_batch(1, [9, 4], 6), causal_batch(2, [9, 4], 6)
    batches = [
        replace(heavy, loss_weights=torch.full((6,), 2.0)),
        replace(light, loss_weights=torch.full((6,), 0.25)),
    ]
    batches[1] = replace(batches[1], documents=torch.tensor([[0, 7, 0], [0, 8, 0]]))
    run: Any = SimpleNamespace(
        ranks=Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
        folder=RunFolder(tmp_path),
    )
    (line,) = on_threads(1, lambda rank: name_worst(3, batches, [torch.tensor(12.0), torch.tensor(6.0)], run))
    assert "largest loss 4, rank 0: documents (source, id, piece) (0, 7, 0)" in line
    (file,) = tmp_path.glob("logs/spike-step-*.json")
    assert json.loads(file.read_text())[0]["loss_weights"] == [0.25] * 6
