"""Whether the content of a result file is of the types that tables and plots take. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bico_ds.common.json_files import is_number

Check = Callable[[Any], bool]


def check_tasks(tasks: Any) -> None:
    """Raise `ValueError` that names the first value of `tasks`, as in a result file, that is of another type."""
    for name, task in _objects("tasks", tasks):
        for key, fits in _TASK.items():
            if key in task and not fits(task[key]):
                raise ValueError(f"tasks.{name}.{key} is not what a result has there")
        if task["headline"] not in task["metrics"]:
            raise ValueError(f"tasks.{name} has no metric '{task['headline']}', its headline")
        asked = task.get("rows", [])
        if any(is_number(row.get(name)) is not True for row in asked for name in task["metrics"]):
            raise ValueError(f"tasks.{name}.rows: a prompt without a score")


def check_training_texts(texts: Any, tasks: Any) -> None:
    """The same for `training_texts`, whose scores are by the metrics of these tasks."""
    for name, found in _objects("training_texts", texts):
        headline = tasks[name]["headline"] if name in tasks else None
        for order, scores in _objects(f"training_texts.{name}.scores", found.get("scores")):
            where = f"training_texts.{name}.scores.{order}"
            if not _numbers(scores.get("metrics")) or headline not in scores["metrics"]:
                raise ValueError(f"{where}.metrics has no score of the task's headline")
            if not _intervals(scores.get("intervals")) or headline not in scores["intervals"]:
                raise ValueError(f"{where}.intervals has none of the task's headline")
            if type(scores.get("prompts")) is not int:
                raise ValueError(f"{where}.prompts is no number")


def check_perplexities(section: str, texts: Any) -> None:
    """The same for the perplexities of texts in this section."""
    for name, text in _objects(section, texts):
        for key, fits in {"perplexity": _number, "times": _number_or_none}.items():
            if key in text and not fits(text[key]):
                raise ValueError(f"{section}.{name}.{key} is no number")
        if "perplexity" not in text:
            raise ValueError(f"{section}.{name} has no perplexity")


def check_losses(held_out: Any) -> None:
    """The same for `held_out`: losses by store and objective."""
    for name, losses in _objects("held_out", held_out):
        for objective, found in _objects(f"held_out.{name}", losses):
            if not _number(found.get("loss")):
                raise ValueError(f"held_out.{name}.{objective}.loss is no number")
            if not _whole(found.get("targets", 0)):
                raise ValueError(f"held_out.{name}.{objective}.targets is no whole number")


def _objects(where: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise ValueError(f"{where} is no object of objects")
    return list(values.items())


def _number(value: Any) -> bool:
    """A perplexity may be infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(is_number, values.values()))


def _intervals(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in values.values()
    )


def _whole(value: Any) -> bool:
    return type(value) is int


def _prompts(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in ("prompt", "answer", "group"))
        and isinstance(row.get("prediction", ""), str)
        for row in rows
    )


_TASK: dict[str, Check] = {
    "headline": lambda value: isinstance(value, str),
    "metrics": _numbers,
    "intervals": _intervals,
    "floors": _numbers,
    "new_tokens": _whole,
    "scoring": _whole,
    "rows": _prompts,
}
