"""A recipe's source `sampled: N`: made once per model, never by a dry run, and refused where it would take hours."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.data.store import TokenStore
from bico_ds.training import assembly

TOKENS = 200


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama, tokenizer) -> Recipe:
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("w1 w2 w3\n" * 3)
    return load_recipe(
        "tiny_base",
        [
            f"model.path={tmp_path}/model",
            "model.config=null",
            "model.tokenizer=null",
            f"data.sources=[{{files: [{tmp_path}/a.txt]}}]",
            f"data.cache_dir={tmp_path}/cache",
            "data.capacity=32",
            "evaluation.tasks=[]",
            f"replay={{tokens: {TOKENS}, token_share: 0.25}}",
        ],
    )


def _replay(recipe: Recipe, *, weights_needed: bool = True) -> Path:
    return assembly.prepare_stores(recipe, weights_needed=weights_needed, progress=False)[1]


def test_a_store_is_sampled_at_the_first_use_and_found_until_the_weights_change(recipe, tmp_path, tokenizer):
    made = _replay(recipe)
    store = TokenStore.open(made, verify="checksums", tokenizer_hash=None)
    store.check_tokenizer(tokenizer)
    assert TOKENS <= store.manifest.tokens < TOKENS + recipe.data.capacity
    assert int(store.lengths.max()) <= recipe.data.capacity
    assert f"sampled from {tmp_path}/model, seed {recipe.seed}" in (made / "provenance.txt").read_text()
    written = (made / "manifest.json").stat().st_mtime_ns
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # as on another node that has its own copy
    assert _replay(recipe) == made
    assert (made / "manifest.json").stat().st_mtime_ns == written
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 2.0)
    save_file(tensors, weights, metadata={"format": "pt"})
    again = _replay(recipe)
    assert again != made
    # Norms of 2 double the logits.
    assert not np.array_equal(
        np.fromfile(made / "tokens.bin", "<u2"), np.fromfile(again / "tokens.bin", "<u2")
    )


def test_a_dry_run_counts_as_many_tokens_and_samples_none(recipe, tmp_path, caplog):
    stand_in = _replay(recipe, weights_needed=False)
    assert f"a start samples {TOKENS} tokens from {tmp_path}/model" in caplog.text
    assert TokenStore.open(stand_in).manifest.tokens == TOKENS
    assert not list((tmp_path / "cache").glob("sampled-*"))
    caplog.clear()
    made = _replay(recipe)
    assert made != stand_in
    assert _replay(recipe, weights_needed=False) == made
    assert not caplog.text


def test_a_billion_parameters_are_refused_with_the_command_and_the_key(tmp_path):
    key = "replay={tokens: 5000, token_share: 0.1}"
    recipe = load_recipe("llama3_8b_bico", [key, f"data.cache_dir={tmp_path}"])
    with pytest.raises(UserError) as refused:
        assembly.prepare_stores(recipe, weights_needed=False, progress=False)
    text = str(refused.value)
    assert "below 1,000,000,000 parameters, and this one has 8,030,261,248" in text
    command = f"bico-ds prepare replay --model {recipe.model.path} --tokens 5000 --max-length {recipe.data.capacity}"
    assert command in text
    assert "replay: {store: stores/replay, token_share: 0.1}" in text
    assert not list(tmp_path.iterdir())


def test_random_weights_are_refused(tmp_path):
    recipe = load_recipe("tiny_base", ["replay={tokens: 5000, token_share: 0.1}"])
    assert recipe.model.path is None
    with pytest.raises(UserError, match="random weights .* knows nothing to sample"):
        assembly.prepare_stores(recipe, progress=False)
