"""The divergence from the start model under ZeRO-3: ranks that compare different numbers of rows, and steps without any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bico_ds.attention.plan import build_plan
from bico_ds.batch import ComparedRows, PackedBatch
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.config.sections.retention import RetentionSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.checksums import base_fingerprint
from bico_ds.runtime.distributed import Ranks
from bico_ds.training.step_totals import agree
from bico_ds.training.trainer import Trainer
from tests.distributed.model_ranks import VOCABULARY, causal_batch, ds_config, run_on_ranks

pytestmark = pytest.mark.distributed

RANKS, KL = 2, 3.0
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
SPEC = ModelSpec(
    config=CONFIG,
    dtype="fp32",
    lora=LoraSpec(rank=4, dropout=0.0),
    activation_checkpointing=1,
    loss_chunk_rows=3,
)
# Of each step the rows that each rank compares; None: a bidirectional step, in which nothing is.
STEPS: tuple[tuple[int, int] | None, ...] = (
    (8, 0),
    (5, 2),
    None,
    (0, 7),
    (0, 0),
    None,
    None,
    (3, 3),
    (1, 0),
    (4, 4),
)


def batch_of(step: int, rank: int, compared: tuple[int, int] | None) -> PackedBatch:
    lengths = [9, 4] if rank == 0 else [11]
    batch = causal_batch(10 * step + rank, lengths, 8)
    if compared is None:
        return replace(batch, plan=build_plan("bidirectional", kept_lengths=lengths))
    return replace(
        batch, compared=ComparedRows(index=torch.arange(compared[rank]), exclude_target=step % 2 == 0)
    )


def train(engine: Any, of_ranks: list[int], ranks: Ranks) -> list[list[float]]:
    """The trainer's own passes over these ranks' batches; the sums of the divergences of each step."""
    recipe = SimpleNamespace(seed=1, retention=RetentionSpec(kl=KL))
    trainer = SimpleNamespace(run=SimpleNamespace(ranks=ranks, recipe=recipe, stop=False), engine=engine)
    found = []
    for trainer.step, compared in enumerate(STEPS):
        batches = [batch_of(trainer.step, rank, compared) for rank in of_ranks]
        counts = agree(SimpleNamespace(batches=batches), trainer.run).counts  # type: ignore[arg-type]
        losses = Trainer._forward_backward(trainer, batches, counts)  # type: ignore[arg-type]
        engine.step()
        found.append([part.divergence.item() for part in losses])
    return found


class OneProcess:
    """Plain SGD under the calls of an engine; `step` between micro-batches does nothing, as in DeepSpeed's."""

    def __init__(self, model: TrainableModel, micro_batches: int) -> None:
        self.model, self.every, self.calls = model, micro_batches, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-2)

    def __call__(self, batch: PackedBatch) -> Any:
        return self.model(batch)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def adapters(model: TrainableModel) -> dict[str, torch.Tensor]:
    import deepspeed

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in trained]):
        return {name: p.detach().clone() for name, p in trained}


def train_on_ranks(rank: int, world_size: int, folder: str) -> None:
    import deepspeed

    config = ds_config(world_size)
    model = build_model(SPEC, seed=1, ds_config=config, device="cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    before = base_fingerprint(model.causal_lm)
    ranks = Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    divergences = train(engine, [rank], ranks)
    assert base_fingerprint(model.causal_lm) == before
    torch.save((divergences, adapters(engine.module)), f"{folder}/{rank}.pt")


@pytest.fixture
def group_of_one():
    """The trainer adds up counts over a process group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_two_ranks_that_compare_different_rows_end_as_one_process(tmp_path: Path, group_of_one: None) -> None:
    run_on_ranks(train_on_ranks, RANKS, str(tmp_path))
    model = build_model(SPEC, seed=1, ds_config=None, device="cpu")
    untouched = adapters(model)
    one = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    expected = train(OneProcess(model, RANKS), [0, 1], one)
    for rank in range(RANKS):
        divergences, trained = torch.load(tmp_path / f"{rank}.pt")
        # Sums of differences of fp32 logarithms: rounding is that of the logarithms, about 2e-7 per row.
        assert [step[0] for step in divergences] == pytest.approx(
            [s[rank] for s in expected], rel=1e-3, abs=2e-6
        )
        for name, tensor in adapters(model).items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6)
    for step, compared in enumerate(STEPS):
        for rank in range(RANKS):
            compares = step > 0 and compared is not None and compared[rank] > 0
            assert (expected[step][rank] > 0) == compares, (
                "nothing before the first update, nor where nothing is compared"
            )
    assert not all(torch.equal(tensor, untouched[name]) for name, tensor in adapters(model).items())
