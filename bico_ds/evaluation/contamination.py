"""Contamination: what the training texts hold of each question, and the scores apart.

A reverse question whose answer stands after it in some training text is no test of reversal: it measures recall.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_hash
from bico_ds.evaluation.results import ORDERS, Order, TaskResult
from bico_ds.evaluation.scoring.share import PromptShare, gather_from_ranks
from bico_ds.evaluation.scoring.statistics import share_interval
from bico_ds.evaluation.tasks.task import Task
from bico_ds.evaluation.tasks.text_search import QuestionSearch, words

_CHUNK_TOKENS = 250_000  # decoded at one time


@dataclass(frozen=True, kw_only=True)
class TrainingTexts:
    """The documents of token stores, each store with the tokenizer that made it."""

    stores: Sequence[tuple[TokenStore, Tokenizer]]

    @property
    def documents(self) -> int:
        return sum(len(store) for store, _ in self.stores)

    @property
    def tokens(self) -> int:
        return sum(store.manifest.tokens for store, _ in self.stores)

    @property
    def names(self) -> list[str]:
        return [str(store.path) for store, _ in self.stores]

    @property
    def fingerprints(self) -> list[str]:
        return [store.fingerprint for store, _ in self.stores]

    def rewritten(self, task: Task) -> int:
        """How many questions a store's tokenizer does not give back word by word, so that they may not be found."""
        asked = [(question.prompt, *question.right_answers) for question in task.questions]
        flat = [text for texts in asked for text in texts]
        kept = np.ones(len(flat), dtype=bool)
        for _, tokenizer in self.stores:
            ids = tokenizer(flat, add_special_tokens=False)["input_ids"]
            kept &= [
                words(back) == words(text)
                for back, text in zip(tokenizer.batch_decode(ids), flat, strict=True)
            ]
        starts = np.cumsum([0, *map(len, asked)])
        return sum(not kept[start:end].all() for start, end in pairwise(starts))

    def chunks(self, share: PromptShare) -> Iterator[list[str]]:
        """This rank's part of the documents, decoded, some at a time; whole documents, before a run cuts them."""
        for store, tokenizer in self.stores:
            own = np.arange(share.rank, len(store), share.world_size)
            if not len(own):
                continue
            chunk_of = np.cumsum(store.lengths[own]) // _CHUNK_TOKENS
            for ids in np.split(own, np.flatnonzero(np.diff(chunk_of)) + 1):
                documents = store.whole(ids)
                spans = pairwise(documents.offsets.tolist())
                tokens = [documents.token_ids[start:end].tolist() for start, end in spans]
                # Special tokens stay: what stands on both sides of one is not in a row.
                yield tokenizer.batch_decode(tokens)


def open_training_texts(paths: Sequence[Path], model: FolderOrHub) -> TrainingTexts:
    """The stores at `paths`, to be decoded by the tokenizer in each store's folder; by that of `model` where it has none.

    Raises `UserError`, which begins with `--train`, for what is no store, and where neither tokenizer made the store.
    """
    stores = []
    for path in paths:
        try:
            store = TokenStore.open(path)
            own = path / "tokenizer"
            tokenizer = load_tokenizer(own if own.is_dir() else model)
        except UserError as error:
            raise UserError(f"--train {path}: {error}") from error
        if tokenizer_hash(tokenizer) != store.manifest.tokenizer_hash:
            where = "the one in its folder" if own.is_dir() else "that of --model"
            raise UserError(
                f"--train {path}: was made with another tokenizer than {where}, and cannot be read back as text; "
                "prepare it again"
            )
        stores.append((store, tokenizer))
    return TrainingTexts(stores=stores)


def find_orders(
    tasks: Sequence[Task], texts: TrainingTexts, share: PromptShare
) -> dict[str, list[Order]] | None:
    """For every question, by task name, in which order the texts hold it and its answer; the ranks share out the documents.

    `share.on_batch` counts documents. The same on every rank, or None on all where any had to stop. Collective.
    """
    search, stopped = QuestionSearch(tasks), False
    for chunk in texts.chunks(share):
        stopped = share.should_stop()
        if stopped:
            break
        for text in chunk:
            search.read(text)
        share.on_batch(len(chunk))
    gathered = gather_from_ranks((search.found, stopped), share)
    if any(rank_stopped for _, rank_stopped in gathered):
        return None
    search.found = np.bitwise_or.reduce([found for found, _ in gathered])
    return {task.name: search.orders(task) for task in tasks}


def apart(
    task: Task, result: TaskResult, orders: Sequence[Order], texts: TrainingTexts, *, rewritten: int
) -> dict[str, Any]:
    """A task's scores by order, `same`, `reverse`, `both`, `neither`, for the orders that some question has.

    Each has `prompts`, `persons`, `metrics` and `intervals` as the task itself has them. `rows`, as long as the task's: the
    order of every prompt. `stores` and `documents`: what was searched. `without_subject`: as the task has it. `rewritten`:
    as the texts count them.
    """
    return {
        "stores": texts.names,
        "documents": texts.documents,
        "without_subject": task.without_subject,
        "rewritten": rewritten,
        "scores": {
            order: _scores(
                [prompt for prompt, x in zip(result.prompts, orders, strict=True) if x == order], result
            )
            for order in ORDERS
            if order in orders
        },
        "rows": list(orders),
    }


def _scores(prompts: Sequence[Mapping[str, Any]], result: TaskResult) -> dict[str, Any]:
    groups = [prompt["group"] for prompt in prompts]
    values = {metric: [prompt[metric] for prompt in prompts] for metric in result.metrics}
    return {
        "prompts": len(prompts),
        "persons": len(set(groups)),
        "metrics": {metric: sum(scores) / len(scores) for metric, scores in values.items()},
        "intervals": {metric: share_interval(scores, groups) for metric, scores in values.items()},
    }
