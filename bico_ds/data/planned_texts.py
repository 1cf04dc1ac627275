"""The texts of a recipe as far as a plan needs them, lengths and their number, without torch and without a tokenizer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.data import SourceSpec
from bico_ds.data.loading.mixture import Mixture
from bico_ds.data.loading.sequences import cut_documents
from bico_ds.data.prepare.facts import own_vocabulary, training_words
from bico_ds.data.store import TokenStore
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.workload import Drawn, Texts, assumed_texts

# Of the embedded texts: SmolLM2's tokenizer makes 542 steps of what the task's own makes 407 (recipes/llama70b_bico.yaml).
_REAL_TOKENS_PER_OWN = 542 / 407


def texts_of(recipe: Recipe) -> Texts:
    """A data epoch of the recipe: stores that are here are read, embedded facts counted; else documents fill bins.

    Sources are cut and mixed as the loader does it, but for the BOS that it gives later pieces of a document. Raises
    `UserError` for a damaged store, and for a source of which nothing is left.
    """
    documents = [_documents(source, recipe) for source in recipe.data.sources]
    found = [lengths for lengths in documents if lengths is not None]
    if len(found) < len(documents):
        return assumed_texts(recipe)
    cut = [
        cut_documents(lengths, longest=recipe.data.capacity, overlong=recipe.data.overlong).length
        for lengths in found
    ]
    if not all(map(len, cut)):
        raise UserError(
            f"data.sources: a source has no document that fits a bin (data.capacity: {recipe.data.capacity}, "
            f"data.overlong: {recipe.data.overlong})"
        )
    return Texts.of_objectives(recipe, lambda number: _draw(recipe, number, cut), source=_origin(recipe))


def _draw(recipe: Recipe, objective: int, cut: list[NDArray[np.int32]]) -> Drawn:
    """A data epoch of the objective of this number, from the lengths of each source's sequences."""
    data, counts = recipe.data, [len(part) for part in cut]
    members = data.source_numbers(recipe.objectives[objective].sources)
    tokens = [int(part.sum()) for part in cut]
    mixture = Mixture.of(data.sources, counts, tokens, recipe.seed, members=members)
    index = mixture.epoch(0).index
    return Drawn(
        lengths=np.concatenate(cut).astype(np.int64)[index],
        sources=np.repeat(np.arange(len(cut)), counts)[index],
        passes=mixture.passes,
    )


def _documents(source: SourceSpec, recipe: Recipe) -> NDArray[np.int64] | None:
    """Tokens of each document, int64 [documents]; None where that is not known before the source was prepared."""
    if source.facts is not None:
        own = training_words(recipe.data.facts, source.facts, source.derive) + source.add_bos + source.add_eos
        return own if _has_own_tokenizer(recipe) else np.rint(own * _REAL_TOKENS_PER_OWN).astype(np.int64)
    if source.sampled is not None:
        return np.full(-(-source.sampled // recipe.data.capacity), recipe.data.capacity, dtype=np.int64)
    if source.store is None or not source.store.here().is_dir():
        return None
    return TokenStore.open(source.store.here(), verify="structure").lengths


def _has_own_tokenizer(recipe: Recipe) -> bool:
    """Whether the model's vocabulary is that of the embedded task's tokenizer, with which small models begin."""
    return read_architecture(recipe.model).vocabulary == own_vocabulary(recipe.data.facts)


def _origin(recipe: Recipe) -> str:
    embedded = [source for source in recipe.data.sources if source.facts is not None]
    if not embedded:
        return "read from the stores"
    if _has_own_tokenizer(recipe):
        return "counted by the embedded task's own tokenizer"
    return f"embedded texts counted, {_REAL_TOKENS_PER_OWN:.2f} tokens for one of their own tokenizer, as SmolLM2's has it"
