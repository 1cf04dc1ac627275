"""The metrics of an evaluation by name: the keys of metrics.jsonl without `evaluation/`, as `checkpoint.keep_best` has them.

`TASK/headline` and `TASK/METRIC` of a task, `text/NAME/perplexity` and `text/NAME/times_base` of a retention text,
`held_out/NAME/OBJECTIVE` of a held-out store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.json_files import is_number

_PREFIX = "evaluation/"
_TEXT, _HELD_OUT = "text/", "held_out/"
_LESS_IS_BETTER = ("nll", "rank")
_NO_METRICS = ("_low", "_high", f"{_PREFIX}seconds")  # the ends of intervals belong to their scores
_MOST_LISTED = 12


def numbers_of_line(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite metrics of a line of metrics.jsonl."""
    return {
        key.removeprefix(_PREFIX): float(value)
        for key, value in record.items()
        if key.startswith(_PREFIX) and is_number(value) and not key.endswith(_NO_METRICS)
    }


def numbers_of_texts(texts: Mapping[str, Mapping[Any, tuple[float, float | None]]]) -> dict[str, float]:
    """The finite metrics of texts; of each one its last perplexity, and that of the base where it is known."""
    last = {name: [*figures.values()][-1] for name, figures in texts.items() if figures}
    numbers = {f"{_TEXT}{name}/perplexity": perplexity for name, (perplexity, _) in last.items()}
    numbers |= {f"{_TEXT}{name}/times_base": value / base for name, (value, base) in last.items() if base}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def less_is_better(metric: str) -> bool:
    """Whether the model is the better, the smaller this metric is."""
    return metric.startswith((_TEXT, _HELD_OUT)) or metric.rpartition("/")[2] in _LESS_IS_BETTER


def chosen_metric(option: str, word: str, known: Iterable[str]) -> str:
    """The metric that `word` names: a metric, a task (its headline), a text (its perplexity) or a store with one loss.

    Raises `UserError`, which begins with `option`, where none or several are meant.
    """
    names = list(dict.fromkeys(known))
    for name in (word, f"{word}/headline", f"{_TEXT}{word}/perplexity", f"{_TEXT}{word}"):
        if name in names:
            return name
    found = [name for name in names if name.startswith((f"{word}/", f"{_HELD_OUT}{word}/"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{option} {word}: which one? {_listed(found)}")
    short = dict.fromkeys(name.removesuffix("/headline") for name in names)
    texts = [name.split("/")[1] for name in names if name.startswith((_TEXT, _HELD_OUT))]
    near = did_you_mean(word, [*short, *texts])
    raise UserError(f"{option} {word}: no run has it{near}; found: {_listed(short)}")


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f", … ({len(found)} in all)" if len(found) > _MOST_LISTED else ""
    return (", ".join(found[:_MOST_LISTED]) or "none") + more
