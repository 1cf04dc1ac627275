"""The store of a recipe's source `sampled: N`: made at the first use, then found again in `data.cache_dir`."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.common.random_numbers import hash_words
from bico_ds.config.schema import Recipe
from bico_ds.data.prepare.recipe_sources import check_cached
from bico_ds.data.replay.sampled_store import SampleShare, SampleSpec, sample_store, start_token, write_texts
from bico_ds.data.replay.sampling import Model
from bico_ds.data.store import Verify, provenance
from bico_ds.data.tokenizer import FastTokenizer, special_ids, tokenizer_hash, vocabulary_size
from bico_ds.planner.architecture import read_architecture

# Rank 0 samples at the start of a run while the others wait; larger models take hours for it.
MOST_PARAMETERS = 1_000_000_000


def check_sampled(recipe: Recipe) -> None:
    """Raise `UserError` where a source is to be sampled from a model without weights, or one that is too large for it."""
    for number, source in enumerate(recipe.data.sources):
        if source.sampled is None:
            continue
        key = f"data.sources.{number}.sampled"
        if recipe.model.path is None:
            raise UserError(f"{key}: a model of random weights (model.path: null) knows nothing to sample")
        if (parameters := read_architecture(recipe.model).parameters) >= MOST_PARAMETERS:
            command = f"bico-ds prepare replay --model {shlex.quote(str(recipe.model.path))} --tokens {source.sampled} "
            raise UserError(
                f"{key}: a start samples from models below {MOST_PARAMETERS:,} parameters, and this one has {parameters:,}. "
                f"Run once  {command}--max-length {recipe.data.capacity} --output stores/replay  (as torchrun "
                "--nproc-per-node N -m bico_ds prepare … on N GPUs), and replace the tokens of replay by that store: "
                f"replay: {{store: stores/replay, token_share: {source.token_share or 0.25}}}"
            )


def spec_of(
    recipe: Recipe, tokens: int, tokenizer: FastTokenizer, *, stops: tuple[int, ...], weights: str
) -> SampleSpec:
    """What a source `sampled: tokens` is: texts up to a bin's length. `weights`: a name of the model's weights."""
    return SampleSpec(
        tokens=tokens,
        most_tokens=recipe.data.capacity,
        seed=recipe.seed,
        start=start_token(tokenizer),
        stops=stops,
        model=weights,
    )


def sampled_path(recipe: Recipe, spec: SampleSpec, tokenizer: FastTokenizer) -> Path:
    """Where the store of these samples is, or will be: named by all that it depends on."""
    key = json.dumps([spec.key, spec.tokens, tokenizer_hash(tokenizer)])
    return recipe.data.cache_dir.here() / f"sampled-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def prepare_sampled(
    recipe: Recipe,
    spec: SampleSpec,
    tokenizer: FastTokenizer,
    *,
    load: Callable[[], Model],
    share: SampleShare,
    verify: Verify,
) -> Path:
    """Return the store of the texts that `load`'s model sampled; made where missing.

    Raises `UserError` for a damaged store, and for a model that has no more texts to give.
    """
    path = sampled_path(recipe, spec, tokenizer)
    if path.exists():
        check_cached(path, tokenizer_hash(tokenizer), verify)
        return path
    text = provenance(f"sampled from {recipe.model.path}, seed {recipe.seed}", None)
    try:
        sample_store(load, tokenizer, spec, path, share, provenance=text)
    except UserError:
        if not path.exists():  # else another process made it while this one waited
            raise
    return path


def stand_in(recipe: Recipe, tokens: int, tokenizer: FastTokenizer) -> Path:
    """Return a store of `tokens` random tokens in texts that fill a bin: a dry run counts it in the place of samples."""
    start, longest = start_token(tokenizer), recipe.data.capacity
    key = json.dumps([tokens, longest, start, tokenizer_hash(tokenizer)])
    path = recipe.data.cache_dir.here() / f"stand-in-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = provenance("random tokens in the place of samples, for dry runs", None)
        write_texts(_random_texts(tokens, longest, start, tokenizer), tokenizer, start, path, text)
    return path


def _random_texts(
    tokens: int, longest: int, start: int, tokenizer: FastTokenizer
) -> Iterator[NDArray[np.int64]]:
    ordinary = np.setdiff1d(np.arange(vocabulary_size(tokenizer)), list(special_ids(tokenizer)))
    for first in range(0, tokens, longest):
        length = max(2, min(longest, tokens - first))
        draws = hash_words("stand-in", first, np.arange(1, length)) % np.uint64(len(ordinary))
        yield np.concatenate([[start], ordinary[draws.astype(np.int64)]])
