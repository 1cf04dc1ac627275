"""A loss that is not finite on one rank stops all of them before the update, or is skipped, as the recipe asks."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.config.load import load_recipe
from bico_ds.data.prepare.recipe_sources import facts_folder
from bico_ds.data.tokenizer import load_tokenizer
from tests.distributed.launching import metrics, train
from tests.distributed.survival import RECIPE, SMALL, state

MANY = (
    *SMALL, "data.facts.name_first=20", "data.facts.description_first=20", "data.facts.both=60",
    "model.config.vocab_size=227", "training.global_batch_bins=2", "training.micro_batch_bins=1",
)  # fmt: skip

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, Path, int]:
    """(model folder, tokenizer folder, token): the embedding of one token, of few documents, is not a number."""
    root = tmp_path_factory.mktemp("poisoned")
    recipe = load_recipe(RECIPE, [*MANY, f"data.cache_dir={root / 'data'}"])
    facts = facts_folder(recipe.data)
    tokenizer = facts / "tokenizer"
    token = rarest_token(facts / "both_orders_train.jsonl", load_tokenizer(str(tokenizer)))
    assert recipe.model.config is not None
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**recipe.model.config))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(root / "model")
    return root / "model", tokenizer, token


def rarest_token(file: Path, tokenizer: Any) -> int:
    """The token of the fewest texts: some steps have it, and some do not."""
    texts = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    count = Counter(
        token for text in texts for token in set(tokenizer(text["prompt"] + text["completion"])["input_ids"])
    )
    return min(count, key=lambda token: count[token])


def run_with(poisoned: tuple[Path, Path, int], run: Path, choice: str):
    model, tokenizer, _ = poisoned
    return train(
        RECIPE, run, *MANY, f"training.on_nonfinite={choice}", f"model.path={model}", f"model.tokenizer={tokenizer}",
        f"data.cache_dir={tokenizer.parents[1]}", timeout=600,
    )  # fmt: skip


def test_stop_names_rank_and_documents_and_leaves_what_reproduces_it(poisoned, tmp_path):
    run = tmp_path / "run"
    done = run_with(poisoned, run, "stop")
    assert done.returncode == 1
    found = re.search(r"error: step (\d+): the loss is not finite; the weights are unchanged", done.stderr)
    assert found, done.stderr
    assert "Traceback" not in done.stderr
    step = int(found[1])
    assert step == 1 or [line["step"] for line in metrics(run)] == list(range(1, step))
    assert state(run)["state"] == "failed"
    assert "the loss is not finite" in state(run)["reason"]
    files = list((run / "logs").glob(f"nonfinite-step-{step:06d}-rank-*.json"))
    assert files
    for file in files:
        (batch, *_) = json.loads(file.read_text())
        assert poisoned[2] in batch["input_ids"]
        assert str(file) in done.stderr


@pytest.mark.drill
def test_skip_goes_on_without_the_update(poisoned, tmp_path):
    run = tmp_path / "run"
    done = run_with(poisoned, run, "skip")
    assert done.returncode == 0, done.stderr
    lines = metrics(run)
    skipped = [line["step"] for line in lines if line["optimizer/skipped_steps"]]
    assert 0 < len(skipped) < len(lines)
    assert "loss or gradient not finite, update skipped" in done.stdout
