"""The model under ZeRO-3 on two real ranks trains as a plain one does, whatever rows the ranks have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_ranks import VOCABULARY, causal_batch, ds_config, run_on_ranks

from bico_ds.config.errors import UserError
from bico_ds.config.schema import ModelSpec
from bico_ds.model.build import TrainableModel, build_model, check_rotary

pytestmark = pytest.mark.distributed

STEPS = 2
BATCHES = [([12, 7], 17), ([5], 0)]  # (document lengths, loss rows): the second rank has nothing to predict
VARIANTS = [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"attention_bias": True}]


def build(variant: int, config: dict | None, checkpoint_every: int = 0) -> TrainableModel:
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
        activation_checkpointing=checkpoint_every,
        loss_chunk_rows=5,
    )
    return build_model(spec, seed=3, ds_config=config, device="cpu")


def train_on_ranks(rank: int, world_size: int, folder: str) -> None:
    """Train every variant, with every kind of activation checkpointing; rank 0 leaves the final weights."""
    import deepspeed

    config = ds_config(world_size)
    for variant in range(len(VARIANTS)):
        model = build(variant, config, checkpoint_every=variant)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        assert model.causal_lm.model.rotary_emb.inv_freq.dtype == torch.float32
        for step in range(STEPS):
            lengths, rows = BATCHES[rank]
            loss = engine(causal_batch(step, lengths, rows))
            assert (loss.item() == 0.0) == (rows == 0)
            engine.backward(loss)
            engine.step()
        weights = {}
        for name, parameter in model.causal_lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        if rank == 0:
            torch.save(weights, Path(folder) / f"{variant}.pt")


def test_two_ranks_of_very_different_rows_train_as_plain_torch_does(tmp_path: Path) -> None:
    run_on_ranks(train_on_ranks, 2, str(tmp_path))
    for variant in range(len(VARIANTS)):
        model = build(variant, None)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            optimizer.zero_grad()
            (sum(model(causal_batch(step, lengths, rows)) for lengths, rows in BATCHES) / 2).backward()
            optimizer.step()
        for name, weight in torch.load(tmp_path / f"{variant}.pt").items():
            expected = model.causal_lm.get_parameter(name)
            torch.testing.assert_close(weight, expected, atol=1e-7, rtol=1e-5)


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
