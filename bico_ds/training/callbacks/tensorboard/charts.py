"""TensorBoard's CUSTOM SCALARS: which curves share a chart.

TensorBoard merges the layouts of all runs that it shows, in the order of their names: charts that are equal become one, and
a category stands where the first run has it. So the charts name what any run may have, and each run has the categories that
nearly all fill.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MarginChartContent,
    MultilineChartContent,
)
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

from bico_ds.config.objectives.base import MonitorPlace
from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.evaluation import DIRECTIONS, EvaluationSpec
from bico_ds.training.callbacks.tensorboard.tags import DETAILS, DIVERGENCE, HELD_OUT, LOSS, RETENTION, tag_of
from bico_ds.training.callbacks.utilization import TAG as MFU
from bico_ds.training.callbacks.work import SHARE, SHARED

# Each pair of tasks side by side. The other way round: TensorBoard 2.21 shows the charts with margins of a category from its
# end to its beginning.
_QUESTIONS = {
    "d2n_reverse": "D2N, REVERSE: name → description",
    "d2n": "D2N, forward: description → name",
    "n2d_reverse": "N2D, REVERSE: description → name",
    "n2d": "N2D, forward: name → description",
}
# The task whose score stands beside what it costs.
_FRONTIER = "n2d_reverse"
_TEXTS = f"{RETENTION}/(?!{DIVERGENCE.rpartition('/')[2]}$).+"
_USUAL_CHART = MonitorPlace.chart


def charts(recipe: Recipe, *, has_mfu: bool) -> Layout:
    """The reversal tasks with their intervals, the frontier, losses where the objectives' specs place them, and speed.

    `has_mfu`: whether MFU is known. A chart is there only where this run writes something of it.
    """
    categories = {
        "reversal": [_with_interval(title, task) for task, title in _questions(recipe.evaluation).items()],
        **({"frontier": _frontier(recipe)} if recipe.evaluation.texts else {}),
        "loss": _losses(recipe),
        "speed": _speed(recipe, has_mfu=has_mfu),
    }
    return Layout(category=[Category(title=title, chart=of) for title, of in categories.items()])


def _questions(spec: EvaluationSpec) -> dict[str, str]:
    """The titles of charts by task; the user's own questions are shown first, those the other way round before others."""
    titles = {task: title for task, title in _QUESTIONS.items() if task in spec.reversal_tasks}
    for own in reversed(spec.question_files):
        words = [direction.replace("_", " ") for direction in DIRECTIONS[own.kind]]
        ways = [f"{own.name}, {words[0]}", f"{own.name}, {words[1].upper()}"] if words else [own.name]
        titles |= dict(zip(own.task_names, ways, strict=True))
    return titles


def _with_interval(title: str, task: str) -> Chart:
    value, lower, upper = (tag_of(f"evaluation/{task}/headline{end}") for end in ("", "_low", "_high"))
    series = MarginChartContent.Series(value=value, lower=lower, upper=upper)
    return Chart(title=title, margin=MarginChartContent(series=[series]))


def _frontier(recipe: Recipe) -> list[Chart]:
    """The score, and what it costs: the perplexity of other texts."""
    asked = _FRONTIER in recipe.evaluation.reversal_tasks
    score = _lines(f"{_FRONTIER}: score", [_exactly(tag_of(f"evaluation/{_FRONTIER}/headline"))])
    return [*([score] if asked else []), _lines("perplexity of other texts, times the start's", [_TEXTS])]


def _losses(recipe: Recipe) -> list[Chart]:
    placed: dict[str, list[str]] = {_USUAL_CHART: []}
    for name, spec in zip(objective_names(recipe.objectives), recipe.objectives, strict=True):
        placed.setdefault(spec.monitor.chart, []).append(tag_of(f"loss/{name}"))
    usual = [tag for tag in placed.pop(_USUAL_CHART) if tag.count("/") > 1]  # else the pattern has them
    elsewhere = "|".join([f"{HELD_OUT}/", *(_exactly(tag) for tags in placed.values() for tag in tags)])
    placed = {_USUAL_CHART: [f"(?!{elsewhere}){LOSS}/[^/]+$", *map(_exactly, usual)]} | {
        chart: [_exactly(tag) for tag in tags] for chart, tags in placed.items()
    }
    if len(recipe.data.sources) > 1:
        placed["loss by source"] = [f"(?!{HELD_OUT}/){LOSS}/[^/]+/.+"]
    if recipe.evaluation.texts or recipe.evaluation.held_out:
        placed["loss of held-out texts"] = [f"{HELD_OUT}/.+"]
    if recipe.retention is not None:
        placed["divergence from the start model"] = [_exactly(DIVERGENCE)]
    return [_lines(title, tags) for title, tags in placed.items()]


def _speed(recipe: Recipe, *, has_mfu: bool) -> list[Chart]:
    counted = [tag_of(f"speed/{which}_tokens_per_second") for which in ("kept", "represented")]
    found = [_lines("tokens per second", list(map(_exactly, counted)))]
    if has_mfu:
        found.append(_lines("MFU", [f"{tag_of(MFU)}(/|$)"]))
    if len(recipe.objectives) > 1:
        found += [_lines(f"share of {what}", [f"{DETAILS}/{SHARE}/{key}/.+"]) for key, what in SHARED.items()]
    return found


def _lines(title: str, tags: Sequence[str]) -> Chart:
    return Chart(title=title, multiline=MultilineChartContent(tag=tags))


def _exactly(tag: str) -> str:
    """TensorBoard takes a regular expression, which only begins where the tag does."""
    return f"{re.escape(tag)}$"


def as_summary(layout: Layout) -> Summary:
    """The layout as TensorBoard reads it from an event file."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME))
    tensor = TensorProto(
        dtype=DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto()
    )
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata)])
