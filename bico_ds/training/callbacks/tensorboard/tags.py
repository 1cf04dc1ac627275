"""Under which tags TensorBoard shows the numbers of metrics.jsonl: the number in front sorts the groups. No torch here.

1 reversal    the headline metric of each task           5 memory     what the devices and the host hold
2 loss        all, by objective and source, held-out     6 optimizer  learning rate, norm, skipped updates
3 retention   of other texts, times the start model's    7 data       what was consumed
4 speed       tokens, MFU, what a step waits for         8 details    everything else
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

from bico_ds.evaluation.report.runs import logged_headline

REVERSAL, LOSS, RETENTION, DATA, DETAILS = "1 reversal", "2 loss", "3 retention", "7 data", "8 details"
HELD_OUT, DIVERGENCE = f"{LOSS}/held-out", f"{RETENTION}/divergence"

_GROUPS = {"speed": "4 speed", "memory": "5 memory", "optimizer": "6 optimizer", "data": DATA}
_HEADLINE = re.compile("evaluation/(.+)/headline")
_TEXT = re.compile("evaluation/text/(.+)/(perplexity|times_base)")
_HELD_OUT_STORE = re.compile("evaluation/held_out/([^/]+/[^/]+)")
# The lines of steps have them, and those of evaluations again.
_OF_STEPS = ("work/", "share/")


def tagged(kind: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl by their tags; `kind` is the line's.

    A task's headline metric is there once, as the headline. Of a text the perplexity is shown as the mean loss of its
    tokens, in nats, beside the losses of held-out stores.
    """
    again = _said_again(kind, numbers)
    found: dict[str, float] = {}
    for key, value in numbers.items():
        if not math.isfinite(value) or key in again:
            continue
        tag, text = tag_of(key), _TEXT.fullmatch(key)
        if text is None or text[2] != "perplexity":
            found[tag] = value
        elif value > 0:
            found[tag] = math.log(value)
    return found


def _said_again(kind: str, numbers: Mapping[str, float]) -> set[str]:
    """The keys of what other keys, or the lines of other kinds, say too."""
    if kind != "evaluation":
        return set()
    again = {key for key in numbers if key.startswith(_OF_STEPS)}
    for key in numbers:
        if task := _HEADLINE.fullmatch(key):
            of_task = f"evaluation/{task[1]}/"
            keys = {other.removeprefix(of_task) for other in numbers if other.startswith(of_task)}
            metric = logged_headline(keys)
            again |= {f"{of_task}{metric}", f"{of_task}headline/{metric}"}
    return again


@cache
def tag_of(key: str) -> str:
    """The tag of a key of metrics.jsonl; different keys have different tags, whatever names a recipe gives."""
    group, _, rest = key.partition("/")
    if group in _GROUPS and rest:
        return f"{_GROUPS[group]}/{rest}"
    if key == "loss/divergence":
        return DIVERGENCE
    if group == "loss" and rest and not f"{rest}/".startswith("held-out/"):  # an objective may be called so
        return f"{LOSS}/{rest}"
    if task := _HEADLINE.fullmatch(key):
        return f"{REVERSAL}/{task[1]}"
    if store := _HELD_OUT_STORE.fullmatch(key):
        return f"{HELD_OUT}/{store[1]}"
    if text := _TEXT.fullmatch(key):
        if text[2] == "perplexity":
            return f"{HELD_OUT}/{text[1]}"
        if text[1] != "divergence":
            return f"{RETENTION}/{text[1]}"
    return f"{DETAILS}/{key}"
