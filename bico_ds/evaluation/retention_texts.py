"""Texts that a run does not train on: their perplexity, beside that before training, shows what the model forgets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.evaluation import TextTaskSpec
from bico_ds.data.prepare.input_files import find_files
from bico_ds.data.store import TokenStore, Verify
from bico_ds.data.tokenizer import FastTokenizer
from bico_ds.evaluation.scoring.likelihood import Scored, cut_windows, mean_nll
from bico_ds.evaluation.scoring.share import PromptShare


@dataclass(frozen=True, kw_only=True)
class RetentionText:
    """A text of the recipe in windows, each a sequence whose tokens after the first are predicted."""

    spec: TextTaskSpec
    windows: list[Scored]

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(window.answer_tokens for window in self.windows)

    @property
    def identity(self) -> str:
        """A digest of the windows: perplexities compare where it is equal."""
        content = json.dumps([window.ids for window in self.windows])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_texts(recipe: Recipe, *, verify: Verify) -> None:
    """Raise `UserError` for texts that cannot be read, are empty, or are trained on, as far as no tokenizer is needed.

    `verify`: as `TokenStore.open` takes it, for texts that are stores.
    """
    trained = _trained_paths(recipe) if recipe.evaluation.texts else set()
    for number, spec in _numbered(recipe):
        path, key = _path(spec), _key(number, spec)
        if path.resolve() in trained:
            raise UserError(
                f"{key}: '{path}' is trained on, so it cannot show what is forgotten; name another text"
            )
        if spec.store is None:
            _read_file(path, key)
        else:
            TokenStore.open(path, verify=verify)


def read_texts(
    recipe: Recipe,
    tokenizer: FastTokenizer,
    stores: Sequence[TokenStore],
    *,
    context: int | None,
    add_bos: bool,
) -> list[RetentionText]:
    """The recipe's texts in windows of `evaluation.tasks[].window` tokens, or of the model's `context` where that is less.

    `stores`: those that are trained on. `add_bos`: whether windows of a file begin with BOS; those of a store do where its
    own texts do. Raises `UserError` as `check_texts` does, for a store of another tokenizer or with the content of one in
    `stores`, and where no token is left to predict.
    """
    texts = []
    for number, spec in _numbered(recipe):
        key, window = _key(number, spec), min(spec.window, context or spec.window)
        if spec.store is None:
            content = _read_file(_path(spec), key)
            ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][: spec.tokens]
            windows = cut_windows(ids, window=window, bos=tokenizer.bos_token_id if add_bos else None)
        else:
            store = TokenStore.open(_path(spec), verify="structure")
            store.check_tokenizer(tokenizer)
            if store.fingerprint in {other.fingerprint for other in stores}:
                raise UserError(f"{key}: '{store.path}' holds what is trained on; name another text")
            windows = list(_windows_of_store(store, spec.tokens, window))
        if not windows:
            raise UserError(f"{key}: no token is left to predict; name a longer text, or raise its 'tokens'")
        texts.append(RetentionText(spec=spec, windows=windows))
    return texts


def measure(
    model: PreTrainedModel,
    texts: Sequence[RetentionText],
    before: Mapping[str, Mapping[str, Any]],
    share: PromptShare,
) -> dict[str, dict[str, Any]] | None:
    """By name the `perplexity` of each text under `model`, as a result file holds it; None as `mean_nll`. Collective.

    `times`: how many times that of `before`, results of this function; None where they have none of the same windows.
    `tokens`: how many were predicted. `identity`: of the windows.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        nll = mean_nll(model, text.windows, share)
        if nll is None:
            return None
        perplexity = _exp(nll)
        start = reference(text, before)
        found[text.spec.name] = {
            "perplexity": perplexity,
            "tokens": text.tokens,
            "times": None if start is None else perplexity / start,
            "identity": text.identity,
        }
    return found


def reference(text: RetentionText, before: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The perplexity of the same windows in `before`, results of `measure`; None where there is none."""
    known = before.get(text.spec.name, {})
    return known["perplexity"] if known.get("identity") == text.identity else None


def above_limit(results: Mapping[str, Mapping[str, Any]], specs: Sequence[TextTaskSpec]) -> str | None:
    """Which text of `results` is above its `stop_if_above`, with both numbers; None: none is."""
    for spec in specs:
        times = results.get(spec.name, {}).get("times")
        # Written so that a perplexity that is no number is above every limit.
        if times is not None and spec.stop_if_above is not None and not times <= spec.stop_if_above:
            return (
                f"the perplexity of text '{spec.name}' is {times:.3g} times that before training, above its "
                f"stop_if_above of {spec.stop_if_above:g}"
            )
    return None


def _numbered(recipe: Recipe) -> Iterator[tuple[int, TextTaskSpec]]:
    return ((n, task) for n, task in enumerate(recipe.evaluation.tasks) if isinstance(task, TextTaskSpec))


def _key(number: int, spec: TextTaskSpec) -> str:
    return f"evaluation.tasks.{number} (text '{spec.name}')"


def _path(spec: TextTaskSpec) -> Path:
    path = spec.store or spec.file
    assert path is not None
    return path.here()


def _read_file(path: Path, key: str) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}: '{path}' cannot be read as UTF-8 text: {reason}") from error
    if not content.strip():
        raise UserError(f"{key}: '{path}' is empty")
    return content


def _trained_paths(recipe: Recipe) -> set[Path]:
    """The stores and files of the data sources."""
    sources = recipe.data.sources
    stores = {source.store.here().resolve() for source in sources if source.store is not None}
    files = [str(path.here()) for source in sources for path in source.files or ()]
    return stores | {path.resolve() for path in find_files(files)}


def _windows_of_store(store: TokenStore, tokens: int | None, window: int) -> Iterator[Scored]:
    """Of each document in turn, until `tokens` tokens are read; with BOS before every window where the store has it."""
    bos = store.manifest.bos_id if store.manifest.add_bos else None
    left = store.manifest.tokens if tokens is None else tokens
    for number in range(len(store)):
        ids = store.whole(np.array([number])).token_ids[: max(left, 0)].tolist()
        left -= len(ids)
        if not ids:
            return
        yield from cut_windows(ids[bos is not None :], window=window, bos=bos)


def _exp(nll: float) -> float:
    """Of what a ruined model gives, too: math.exp raises where the result is no fp64 number."""
    return math.exp(nll) if not nll > 700 else math.inf
