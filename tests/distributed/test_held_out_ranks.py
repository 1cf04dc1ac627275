"""Held-out losses by two ranks with partitioned weights, between two steps of training: those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bico_ds.config.load import load_recipe
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.data.store import TokenStore
from bico_ds.evaluation.held_out.loss import measure
from bico_ds.evaluation.held_out.stores import HeldOutStore, read_held_out
from bico_ds.evaluation.scoring.share import ONE_PROCESS, PromptShare
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.weights.materialize import is_partitioned
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.build import build_objectives
from tests.data.stores import BOS, EOS, write_store
from tests.distributed.model_ranks import VOCABULARY, causal_batch, ds_config, run_on_ranks

pytestmark = pytest.mark.distributed

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.3,
}  # fmt: skip
# With dropout, which a loss that is compared must not have.
SPEC = ModelSpec(config=CONFIG, dtype="fp32", lora=LoraSpec(rank=4, dropout=0.5), loss_chunk_rows=5)
ROLES = TokenRoles(special_ids=(BOS, EOS), placeholder_id=0, vocabulary=VOCABULARY)


def opened(trained: str, held_out: str) -> HeldOutStore:
    """Of an odd number of bins, so that the last one is a single rank's."""
    recipe = load_recipe(
        "tiny_bico",
        [
            f"data.sources=[{{store: {trained}}}]",
            f"evaluation.tasks=[{{kind: held_out, name: mine, store: {held_out}}}]",
            "data.capacity=16",
            "training.micro_batch_bins=1",
            "objectives=[{kind: bico, probability: 0.5}, {kind: mlm_u, probability: 0.5}]",
        ],
    )
    TokenStore.check_tokenizer = lambda store, tokenizer: None  # type: ignore[assignment,method-assign]  # in a process of its own
    objectives, stores = build_objectives(recipe.objectives, ROLES), [TokenStore.open(Path(trained))]
    (found,) = read_held_out(recipe, None, stores, objectives, vocabulary=VOCABULARY)  # type: ignore[arg-type]
    assert {name: batches.count for name, batches in found.batches.items()} == {
        "bico": 5,
        "mlm_u": 5,
        "ntp": 5,
    }
    return found


def losses(model: TrainableModel, store: HeldOutStore, share: PromptShare) -> Any:
    return measure(model, [store], share, None)


def _work(rank: int, size: int, trained: str, held_out: str, out: str) -> None:
    import deepspeed

    store = opened(trained, held_out)
    if size == 1:
        model = build_model(SPEC, seed=3, ds_config=None, device="cpu")
        Path(out).write_text(json.dumps(losses(model, store, ONE_PROCESS)))
        return
    model = build_model(SPEC, seed=3, ds_config=ds_config(size), device="cpu")
    engine, *_ = deepspeed.initialize(model=model, config=ds_config(size), dist_init_required=False)
    assert all(is_partitioned(p) for p in model.parameters())
    share = PromptShare(rank=rank, world_size=size, synced=True)
    before = losses(engine.module, store, share)
    engine.backward(engine(causal_batch(rank, [9, 4], 6)).loss)
    engine.step()
    after = losses(engine.module, store, share)
    assert engine.module.training
    Path(f"{out}-{rank}").write_text(json.dumps([before, after]))


def test_two_ranks_under_zero3_measure_what_one_process_does(tmp_path):
    rng = np.random.default_rng()
    lengths = [9, 10, 12, 9, 11]  # a bin each
    paths = []
    for name in ("trained", "held_out"):
        tokens = rng.integers(3, VOCABULARY, sum(lengths))
        paths.append(str(write_store(tmp_path / name, lengths, add_bos=True, tokens=tokens).path))
    out = str(tmp_path / "found")
    run_on_ranks(_work, 1, *paths, out)
    run_on_ranks(_work, 2, *paths, out)
    alone = json.loads(Path(out).read_text())
    of_ranks = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(2)]
    assert of_ranks[0] == of_ranks[1]
    before, after = of_ranks[0]
    assert before == alone, "the same micro-batches, added in the same order"
    assert all(after["mine"][name]["loss"] != alone["mine"][name]["loss"] for name in alone["mine"])
    assert torch.isfinite(torch.tensor([x["loss"] for x in after["mine"].values()])).all()
