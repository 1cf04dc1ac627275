"""The model under ZeRO-2 and ZeRO-3 on two real ranks trains as a plain one does, whatever rows the ranks have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.batch import PackedBatch, total_weight
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.mlm_u import MlmUSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel, build_model, check_rotary
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.mlm_u import UniformRateDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.optim.schedule import build_scheduler
from bico_ds.runtime.ds_config import build_ds_config
from tests.distributed.model_ranks import VOCABULARY, causal_batch, ds_config, run_on_ranks

pytestmark = pytest.mark.distributed

OBJECTIVES = {
    "ntp": NextTokenPrediction(spec=NtpSpec()),
    "bico": MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.4)), placeholder_id=0),
    "mlm_u": UniformRateDenoising(spec=MlmUSpec(), placeholder_id=0),
}
WEIGHTS = {"full": "model.lora=null", "lora": "model.lora={rank: 4, alpha: 8, dropout: 0.0}"}
STAGES = (2, 3)
CASES = [*product(STAGES, ("ntp", "bico"), WEIGHTS), (3, "mlm_u", "full")]
ADAM_STEPS, SEED = 10, 3

SGD_STEPS = 2
BATCHES = [([12, 7], 17), ([5], 0)]  # (document lengths, loss rows): the second rank has nothing to predict
VARIANTS = [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"attention_bias": True}]


def recipe_of(stage: int, weights: str) -> Recipe:
    """A small model by the shipped configuration; its buckets hold a few weights, as they do in a large model."""
    zero = {2: "allgather_bucket_size=1500", 3: "stage3_param_persistence_threshold=0"}[stage]
    return load_recipe(
        "tiny_base",
        [
            f"model.config.vocab_size={VOCABULARY}", "model.config.hidden_size=32", "model.config.head_dim=8",
            "model.config.num_attention_heads=4", "model.config.num_hidden_layers=2",
            "model.config.intermediate_size=63", WEIGHTS[weights],
            f"deepspeed.config=zero{stage}_bf16", f"deepspeed.overrides.zero_optimization.{zero}",
            "deepspeed.overrides.zero_optimization.reduce_bucket_size=1500",
            "training.micro_batch_bins=1", f"training.steps={ADAM_STEPS}",
            "optimizer.eps=1e-5",  # beside it, a gradient near zero moves its weight by no more than its rounding does
            "schedule.warmup_steps=2", "schedule.decay_steps=3",
        ],
    )  # fmt: skip


def micro_batches(objective: str, step: int, rank: int) -> list[PackedBatch]:
    """Two micro-batches of one rank. In every other step the second rank's documents are too short to predict anything."""
    rng = np.random.default_rng([step, rank])

    def one(number: int) -> PackedBatch:
        lengths = [1] if rank == 1 and step % 2 == 0 else rng.integers(2, 20, size=3)
        documents = [
            Document(token_ids=rng.integers(1, VOCABULARY, length), source=0, id=8 * step + 4 * rank + 2 * number + i)
            for i, length in enumerate(lengths)
        ]  # fmt: skip
        return OBJECTIVES[objective].build(Documents.of(documents), BatchKey(seed=SEED, epoch=0))

    return [one(0), one(1)]


def weight_of(batches: list[PackedBatch]) -> float:
    return sum(map(total_weight, batches))


def adam_on_ranks(rank: int, world_size: int, folder: str) -> None:
    """Train every case as the loop does; each rank leaves its losses, the gradient's norms and the final weights."""
    import deepspeed

    for case in CASES:
        stage, objective, weights = case
        recipe = recipe_of(stage, weights)
        config = build_ds_config(
            recipe, world_size=world_size, hidden_size=32, on_cuda=False, run_folder=Path(folder)
        )
        model = build_model(recipe.model, seed=SEED, ds_config=config, device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trained,
            config=config,
            lr_scheduler=lambda optimizer, recipe=recipe: build_scheduler(
                recipe.schedule, optimizer, ADAM_STEPS
            ),
        )
        sums, norms = [], []
        for step in range(ADAM_STEPS):
            weight = sum(weight_of(micro_batches(objective, step, other)) for other in range(world_size))
            sums.append(0.0)
            for batch in micro_batches(objective, step, rank):
                loss_sum = engine(batch).loss
                engine.backward(loss_sum * world_size / weight, scale_wrt_gas=False)
                engine.step()
                sums[-1] += loss_sum.item()
            assert (sums[-1] == 0.0) == (rank == 1 and step % 2 == 0)
            norms.append(float(engine.get_global_grad_norm()))
        with deepspeed.zero.GatheredParameters(trained):
            final = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        torch.save((sums, norms, final), Path(folder) / f"adam-{case}-{rank}.pt")


def build(variant: int, config: dict | None, recompute_every: int = 0) -> TrainableModel:
    architecture = {
        "hidden_size": 32,
        "intermediate_size": 63,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    spec = ModelSpec(
        config=architecture | VARIANTS[variant],
        dtype="fp32",
        activation_checkpointing=recompute_every,
        loss_chunk_rows=5,
    )
    return build_model(spec, seed=3, ds_config=config, device="cpu")


def sgd_on_ranks(rank: int, world_size: int, folder: str) -> None:
    """Train every variant, with every kind of activation checkpointing; rank 0 leaves the final weights."""
    import deepspeed

    for stage, variant in product(STAGES, range(len(VARIANTS))):
        config = ds_config(world_size, stage)
        model = build(variant, config, recompute_every=variant)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        assert model.causal_lm.model.rotary_emb.inv_freq.dtype == torch.float32
        for step in range(SGD_STEPS):
            lengths, rows = BATCHES[rank]
            loss = engine(causal_batch(step, lengths, rows)).loss
            assert (loss.item() == 0.0) == (rows == 0)
            engine.backward(loss)
            engine.step()
        weights = {}
        for name, parameter in model.causal_lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        if rank == 0:
            torch.save(weights, Path(folder) / f"sgd-{stage}-{variant}.pt")


def train_on_ranks(rank: int, world_size: int, folder: str) -> None:
    sgd_on_ranks(rank, world_size, folder)
    adam_on_ranks(rank, world_size, folder)


@pytest.fixture(scope="module")
def trained_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks, started once, left what came of all trainings."""
    folder = tmp_path_factory.mktemp("trained")
    run_on_ranks(train_on_ranks, 2, str(folder))
    return folder


@pytest.mark.parametrize(("stage", "variant"), product(STAGES, range(len(VARIANTS))))
def test_two_ranks_of_very_different_rows_train_as_plain_torch_does(
    trained_on_ranks: Path, stage: int, variant: int
) -> None:
    model = build(variant, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(SGD_STEPS):
        optimizer.zero_grad()
        (sum(model(causal_batch(step, lengths, rows)).loss for lengths, rows in BATCHES) / 2).backward()
        optimizer.step()
    for name, weight in torch.load(trained_on_ranks / f"sgd-{stage}-{variant}.pt").items():
        expected = model.causal_lm.get_parameter(name)
        torch.testing.assert_close(weight, expected, atol=1e-7, rtol=1e-5)


def adam_in_plain_torch(recipe: Recipe, objective: str) -> Iterator[Any]:
    """Yield the loss and the gradient's norm of every step; at the end the trained weights."""
    model = build_model(recipe.model, seed=SEED, ds_config=None, device="cpu")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = recipe.optimizer
    optimizer = torch.optim.AdamW(
        trained.values(), lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay
    )
    scheduler = build_scheduler(recipe.schedule, optimizer, ADAM_STEPS)
    for step in range(ADAM_STEPS):
        batches = [batch for rank in range(2) for batch in micro_batches(objective, step, rank)]
        loss = sum(model(batch).loss for batch in batches) / weight_of(batches)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        yield loss.item(), norm.item()
    yield trained


@pytest.mark.parametrize(("stage", "objective", "weights"), CASES)
def test_ten_steps_of_the_recipe_s_adam_on_two_ranks_are_those_of_plain_torch(
    trained_on_ranks: Path, stage: int, objective: str, weights: str
) -> None:
    (sums, norms, final), (others, _, other_final) = (
        torch.load(trained_on_ranks / f"adam-{(stage, objective, weights)}-{rank}.pt") for rank in range(2)
    )
    *steps, expected = adam_in_plain_torch(recipe_of(stage, weights), objective)
    for step, (loss, norm) in enumerate(steps):
        weight = sum(weight_of(micro_batches(objective, step, rank)) for rank in range(2))
        assert (sums[step] + others[step]) / weight == pytest.approx(loss, rel=1e-6)
        assert norms[step] == pytest.approx(norm, rel=1e-5)
    assert set(final) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(final[name], weight, atol=1e-7, rtol=1e-5)
        assert final[name].equal(other_final[name]), "one model on all ranks"


def keep_rotary_exact(rank: int, world_size: int, folder: str) -> None:
    """Build the bf16 engine of stages 2 and 3; the frequencies must be what fp32 gives."""
    import deepspeed

    spec = ModelSpec(
        config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"vocab_size": VOCABULARY},
        dtype="bf16",
    )
    for stage in (2, 3):
        config = ds_config(world_size, stage) | {"bf16": {"enabled": True}}
        model = build_model(spec, seed=3, ds_config=config, device="cpu")
        deepspeed.initialize(model=model, config=config)
        exact = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(model.causal_lm.model.rotary_emb.inv_freq, exact, rtol=1e-6, atol=0)
        check_rotary(model)


def test_a_bf16_engine_leaves_the_rotary_frequencies_in_fp32(tmp_path: Path) -> None:
    run_on_ranks(keep_rotary_exact, 2, str(tmp_path))


def test_rounded_rotary_frequencies_are_refused() -> None:
    model = build(0, None)
    model.causal_lm.model.rotary_emb.bfloat16()
    with pytest.raises(UserError, match="install 0\\.19\\.3 or newer"):
        check_rotary(model)
