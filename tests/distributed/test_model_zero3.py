"""The model on real processes under ZeRO-3: what one rank computes, two compute too, whatever their rows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.config.schema import ModelSpec
from bico_ds.model.build import build_model

pytestmark = pytest.mark.distributed

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


def ds_config(world_size: int, stage: int = 3) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def run_on_ranks(worker: Callable[..., None], world_size: int, *args: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start, args=(worker, world_size, port, args), nprocs=world_size)


def _start(rank: int, worker: Callable[..., None], world_size: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    worker(rank, world_size, *args)
    torch.distributed.destroy_process_group()


def causal_batch(seed: int, lengths: list[int], loss_rows: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    return PackedBatch(
        input_ids=torch.randint(0, TINY["vocab_size"], (tokens,), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        plan=build_plan("causal", kept_lengths=lengths),
        loss_rows=torch.arange(loss_rows),
        targets=torch.randint(0, TINY["vocab_size"], (loss_rows,), generator=generator),
        represented_tokens=tokens,
        documents=torch.zeros(len(lengths), 3, dtype=torch.int64),
    )


BATCHES = [([12, 7], 17), ([5], 0)]  # (document lengths, loss rows): the second has nothing to predict


def train(rank: int, world_size: int, folder: str, checkpoint_every: int, tied: bool) -> None:
    """Two steps over both batches, summed; rank 0 leaves losses and final weights in ``folder``."""
    import deepspeed

    spec = ModelSpec(
        config={**TINY, "tie_word_embeddings": tied},
        dtype="fp32",
        activation_checkpointing=checkpoint_every,
        loss_chunk_rows=5,
    )
    config = ds_config(world_size) | {"gradient_accumulation_steps": 2 // world_size, "train_batch_size": 2}
    model = build_model(spec, seed=3, ds_config=config, device="cpu")
    engine, *_ = deepspeed.initialize(model=model, config=config)
    losses = []
    for step in range(2):
        for index, (lengths, rows) in enumerate(BATCHES):
            if index % world_size == rank:
                loss = engine(causal_batch(10 * step + index, lengths, rows))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
    assert model.causal_lm.model.rotary_emb.inv_freq.dtype == torch.float32
    weights = {}
    for name, parameter in model.causal_lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    torch.save(losses, Path(folder) / f"losses-{rank}.pt")
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")


@pytest.mark.parametrize(("checkpoint_every", "tied"), [(0, True), (1, False), (2, True)])
def test_two_ranks_of_very_different_rows_train_as_one(
    tmp_path: Path, checkpoint_every: int, tied: bool
) -> None:
    folders = {world_size: tmp_path / str(world_size) for world_size in (1, 2)}
    for world_size, folder in folders.items():
        folder.mkdir()
        run_on_ranks(train, world_size, str(folder), checkpoint_every if world_size == 2 else 0, tied)
    one, two = (torch.load(folder / "weights.pt") for folder in folders.values())
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-6, rtol=2e-5)
    losses = torch.load(folders[1] / "losses-0.pt")
    assert torch.load(folders[2] / "losses-0.pt") == pytest.approx(losses[0::2], rel=1e-5)
    assert losses[1::2] == torch.load(folders[2] / "losses-1.pt") == [0.0, 0.0]
