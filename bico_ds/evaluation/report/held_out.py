"""Held-out losses of models side by side, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.evaluation.report.tables import markdown_table, score_table
from bico_ds.evaluation.results import EvaluationResult

_BEFORE, _AFTER = ("store", "objective"), ("targets",)
_TITLE, _CAPTION = "Held-out loss", "mean over targets, in nats: the lower, the better"


def has_losses(results: Mapping[str, EvaluationResult]) -> bool:
    """Whether any of the results has the loss of a held-out store."""
    return any(result.held_out for result in results.values())


def loss_table(results: Mapping[str, EvaluationResult]) -> FittingTable:
    """The loss of every store under every objective, one column per model."""
    return score_table(_BEFORE, results, _AFTER, _lines(results), title=_TITLE, caption=_CAPTION)


def loss_markdown(results: Mapping[str, EvaluationResult]) -> str:
    """The same table as Markdown."""
    headers = [*_BEFORE, *results, *_AFTER]
    ruler = ["---"] * 2 + ["--:"] * (len(results) + 1)
    return f"{_TITLE}, {_CAPTION}:\n\n{markdown_table([headers, ruler, *_lines(results)])}"


def loss_remarks(first: tuple[str, EvaluationResult], other: tuple[str, EvaluationResult]) -> Iterator[str]:
    """Which losses of the other model are not of the same texts, cut and masked alike; each model with its label."""
    for store, objective in _losses(first[1]):
        ours, theirs = (_found(result, store, objective) for _, result in (first, other))
        if theirs and ours.get("identity") != theirs.get("identity"):
            yield (
                f"held-out store {store}, {objective}: other texts, or cut or masked otherwise, in {other[0]} than in "
                f"{first[0]}: the losses do not compare"
            )


def _lines(results: Mapping[str, EvaluationResult]) -> Iterator[list[str]]:
    """By store and objective: a loss for every model, and the number of targets (all, where models differ)."""
    for store, objective in dict.fromkeys(key for result in results.values() for key in _losses(result)):
        found = [_found(result, store, objective) for result in results.values()]
        targets = dict.fromkeys(f"{x['targets']:,}" for x in found if "targets" in x)
        losses = (f"{x['loss']:.4f}" if x else "–" for x in found)
        yield [store, objective, *losses, " / ".join(targets) or "–"]


def _losses(result: EvaluationResult) -> Iterator[tuple[str, str]]:
    return ((store, objective) for store, losses in result.held_out.items() for objective in losses)


def _found(result: EvaluationResult, store: str, objective: str) -> Mapping[str, Any]:
    return result.held_out.get(store, {}).get(objective, {})
