"""The store of a recipe's source `sampled: N`: made at the first use, then found again in `data.cache_dir`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.data.replay.sampled_store import SampleShare, SampleSpec, sample_store, start_token
from bico_ds.data.replay.sampling import Model
from bico_ds.data.store import TokenStore, Verify, provenance
from bico_ds.data.tokenizer import FastTokenizer
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
            raise UserError(
                f"{key}: a start samples from models below {MOST_PARAMETERS:,} parameters, and this one has {parameters:,}. "
                f"Run  torchrun --nproc-per-node GPUS -m bico_ds.commands.prepare replay --model {recipe.model.path} "
                f"--tokens {source.sampled} --max-length {recipe.data.capacity} --output stores/replay  once, and replace "
                f"this source by replay: {{store: stores/replay, token_share: {source.token_share or 0.25}}}"
            )


def prepare_sampled(
    recipe: Recipe,
    tokens: int,
    tokenizer: FastTokenizer,
    *,
    stops: tuple[int, ...],
    weights: str,
    load: Callable[[], Model],
    share: SampleShare,
    verify: Verify,
) -> Path:
    """Return the store of `tokens` tokens that `load`'s model sampled, of texts up to a bin's length; made where missing.

    `weights`: a name of the model's weights, by which the cache is keyed. Raises `UserError` for a damaged store.
    """
    spec = SampleSpec(
        tokens=tokens,
        most_tokens=recipe.data.capacity,
        seed=recipe.seed,
        start=start_token(tokenizer),
        stops=stops,
        model=weights,
    )
    name = hashlib.sha256(json.dumps([spec.key, tokens]).encode()).hexdigest()[:16]
    path = recipe.data.cache_dir.here() / f"sampled-{name}"
    if path.exists():
        TokenStore.open(path, verify=verify)
        return path
    text = provenance(f"sampled from {recipe.model.path}, seed {recipe.seed}", None)
    sample_store(load, tokenizer, spec, path, share, provenance=text)
    return path
