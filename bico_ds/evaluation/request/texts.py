"""The perplexity of the texts of a request: those of --retention, and those of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.evaluation.loading import load_tokenizer_and_context, weights_stamp
from bico_ds.evaluation.request.asked import Load, Request
from bico_ds.evaluation.result_file import Part, identity_of
from bico_ds.evaluation.retention_texts import RetentionText, measure, read_texts
from bico_ds.evaluation.scoring.likelihood import text_perplexity
from bico_ds.evaluation.scoring.share import PromptShare

_WINDOWS_PER_BATCH = 4  # a window of a retention text is long, and has logits of every token


def texts_at(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by file name, under which they stand in the result file. Raises `UserError` where one cannot be read."""
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise UserError(
                f"--retention {path}: another text is named {path.name} too, and the result file lists texts by their "
                "names; rename one"
            )
        texts[path.name] = _read_text(path)
    return texts


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--retention {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"--retention {path}: the file is empty")
    return text


def texts_of_recipe(request: Request) -> list[RetentionText]:
    """The recipe's texts, in the windows of its training."""
    if request.recipe is None or not request.recipe.evaluation.texts:
        return []
    tokenizer, context = load_tokenizer_and_context(request.model)
    return read_texts(request.recipe, tokenizer, (), context=context, add_bos=request.add_bos)


def retention_parts(
    request: Request, share: PromptShare, texts: Mapping[str, str], window: int, load: Load
) -> Iterator[Part]:
    """The perplexity of every retention text, under the base model first."""
    share = replace(share, batch_size=_WINDOWS_PER_BATCH)
    models = (("retention_before", "--base", request.base), ("retention", "--model", request.model))
    for section, option, path in models:
        if path is None:
            continue
        for name, text in texts.items():
            identity = identity_of(weights_stamp(path), text, window, request.add_bos)
            compute = partial(_perplexity, request, share, text, window, partial(load, path, option))
            yield Part(section=section, name=name, identity=identity, size=0, compute=compute)


def _perplexity(
    request: Request, share: PromptShare, text: str, window: int, load: Callable[[], tuple[Any, Any]]
) -> dict[str, Any] | None:
    model, tokenizer = load()
    result = text_perplexity(model, tokenizer, text, window=window, add_bos=request.add_bos, share=share)
    return None if result is None else asdict(result)


def recipe_text_parts(
    request: Request, share: PromptShare, texts: Sequence[RetentionText], load: Load
) -> Iterator[Part]:
    """The perplexity of every text of the recipe, as during training; `times`, beside the start model, is not known."""
    share = replace(share, batch_size=_WINDOWS_PER_BATCH)

    def compute(text: RetentionText) -> dict[str, Any] | None:
        model, _ = load(request.model, "--model")
        found = measure(model, [text], {}, share)
        return None if found is None else found[text.spec.name]

    for text in texts:
        yield Part(
            section="texts",
            name=text.spec.name,
            identity=text.identity,
            size=0,
            compute=partial(compute, text),
        )
