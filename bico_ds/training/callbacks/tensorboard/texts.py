"""TensorBoard's TEXT: answers, the recipe, versions, and what was planned beside what was measured, as Markdown.

Whatever a model or a file says is shown as it is: no character of it is Markdown or HTML.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text import metadata

from bico_ds.common.printable import on_one_line
from bico_ds.common.yaml_files import KeyPath
from bico_ds.config.layers import leaves
from bico_ds.config.load import dump_recipe, recorded_values
from bico_ds.config.schema import Recipe
from bico_ds.evaluation.report.wording import metric_name, title_of
from bico_ds.evaluation.results import TaskResult
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.quantities import GB, number, span

# Answers of a task that are shown, right ones and wrong ones, each of another person.
_EACH = 3
_MOST_SHOWN = 300  # characters of a cell
_RIGHT = 0.5  # a score from here on
_ARCHITECTURE = ("model", "config")


def text_value(tag: str, markdown: str) -> Summary.Value:
    """A text as TensorBoard reads it."""
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME),
        ),
        tensor=TensorProto(
            dtype=DT_STRING, string_val=[markdown.encode("utf-8", "replace")], tensor_shape=TensorShapeProto()
        ),
    )


def answers(name: str, task: TaskResult) -> str:
    """The score of a task, and some of its questions with their answers: first wrong ones, then right ones."""
    interval = task.interval
    within = "" if interval is None else f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    metric = metric_name(task.headline)
    head = f"{literal(title_of(name))}: {len(task.prompts)} questions, {metric} **{task.score:.3f}**{within}"
    chosen = [
        *_of_different_persons(row for row in task.prompts if row[task.headline] < _RIGHT),
        *_of_different_persons(row for row in task.prompts if row[task.headline] >= _RIGHT),
    ]
    rows = [
        (
            _mark(row[task.headline]),
            literal(row["prompt"]),
            literal(row["answer"]),
            literal(row["prediction"]),
        )
        for row in chosen
    ]
    return f"{head}\n\n{table(('', 'question', 'right answer', 'the model’s answer'), rows)}"


def _of_different_persons(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    by_person: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        by_person.setdefault(row["group"], row)
        if len(by_person) == _EACH:
            break
    return list(by_person.values())


def _mark(score: float) -> str:
    if score in (0, 1):
        return "✓" if score else "✗"
    return f"{score:.2f}"


def recipe_text(recipe: Recipe) -> str:
    """What of the recipe is not the default, as a table, and all of it as YAML; secrets left out."""
    values = recorded_values(recipe)
    rows = [
        (literal(leaf.path), literal(_written(leaf.value)), default)
        # The architecture, which is long, last.
        for leaf in sorted(leaves(values), key=lambda leaf: leaf.key[:2] == _ARCHITECTURE)
        if leaf.path not in ("name", "description")
        and (default := _other_default(recipe, leaf.key)) is not None
    ]
    head = f"**{literal(values['name'])}**: {literal(values['description'])}"
    differing = table(("key", "value", "default"), rows)
    yaml = textwrap.indent(dump_recipe(recipe), "    ")
    return f"{head}\n\n#### What is not the default\n\n{differing}\n\n#### The whole recipe\n\n{yaml}"


def _other_default(recipe: Recipe, key: KeyPath) -> str | None:
    """The default of a key whose value is another one, empty where it has none; None where the value is the default."""
    *above, last = key
    section: Any = recipe
    for part in above:
        section = getattr(section, str(part)) if isinstance(section, BaseModel) else section[part]
    if not isinstance(section, BaseModel):
        return ""
    field, value = type(section).model_fields[str(last)], getattr(section, str(last))
    if field.is_required() or last == "kind":  # an objective's is its name
        return ""
    default = field.get_default(call_default_factory=True)
    return None if value == default else literal(_written(default))


def _written(value: Any) -> str:
    """As YAML writes it in a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def data_text(streams: Sequence[Mapping[str, Any]]) -> str:
    """What a data epoch of each stream of bins holds (`bico_ds.data.loading.sample_order.StreamReport`)."""
    rows = [
        (
            literal(", ".join(stream["objectives"])),
            literal(source),
            f"{stream['cut'][source]['documents']:,}",
            f"{stream['cut'][source]['tokens']:,}",
            f"{stream['passes'][source]:.3g}",
            f"{stream['shares'][source]:.1%}",
            f"{stream['bins']:,}",
            f"{stream['fill']:.1%}",
        )
        for stream in streams
        for source in stream["passes"]
    ]
    headers = ("objectives", "source", "documents", "tokens", "passes", "share", "bins of the stream", "fill")
    return table(headers, rows)


def versions_text(start: Mapping[str, Any]) -> str:
    """Versions, commit, host and command line of a start (`bico_ds.runtime.provenance`)."""
    known = {key: start.get(key) for key in ("commit", "host", "job", "time", "python")}
    rows = [(key, literal(str(value))) for key, value in known.items() if value]
    rows += [(literal(name), literal(version)) for name, version in start.get("versions", {}).items()]
    command = textwrap.indent(shlex.join(map(str, start.get("command", []))), "    ")
    return f"{table(('', 'version'), rows)}\n\n{command}"


def planned_text(numbers: Mapping[str, float]) -> str:
    """What the planner said beside what was measured, of numbers of the kind `plan`."""
    rows = []
    for key in numbers:
        what, _, is_measured = key.removeprefix("plan/").rpartition("/")
        if is_measured != "measured" or f"plan/{what}/low" not in numbers:
            continue
        measured = numbers[key]
        planned = Range(numbers[f"plan/{what}/low"], numbers[f"plan/{what}/high"])
        unit = GB if what.startswith("memory_bytes") else 1e-3
        rows.append(
            (
                literal(_named(what)),
                f"{number(measured / unit)}",
                span(planned, unit=unit),
                f"{numbers[f'plan/{what}/ratio']:.2f}",
            )
        )
    return table(("", "measured", "planned", "times the middle of the plan"), rows)


def _named(what: str) -> str:
    if what.startswith("memory_bytes"):
        return "memory (planned: tensors alone), GB"
    return f"a step of {what.partition('/')[2]}, ms"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its cells are Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def literal(text: str) -> str:
    """A text on one line, cut where it is long, of which no character means anything in Markdown or HTML."""
    line = on_one_line(" ".join(text.split()), most=_MOST_SHOWN)
    return re.sub(r"[^\w .,]|_", lambda found: f"&#{ord(found[0])};", line)
