"""What TensorBoard shows besides curves: pictures and answers of evaluations, and the plan beside the run. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.objectives.table import objective_names
from bico_ds.data.loading.batch_view import Decode
from bico_ds.evaluation.report.runs import Band, ComparedRun, Curve, load_runs
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.training.callbacks.base import Callback, FirstRankCallback, RunStart
from bico_ds.training.callbacks.best_effort import BestEffort
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.tensorboard.pictures import curves_picture, visibility_picture
from bico_ds.training.callbacks.tensorboard.tags import DATA, DETAILS, REVERSAL
from bico_ds.training.callbacks.tensorboard.texts import answers, planned_text, text_value

PICTURES_SECONDS = "speed/pictures_seconds"

Point = TypeVar("Point", tuple[int, float], tuple[int, float, float])


class BoardPages(FirstRankCallback):
    """At each evaluation pictures and answers; who sees whom also at the end. Drawn where training pauses.

    Who sees whom is drawn of the last batch of each objective that masks, or of all where none does. `decode`: what a token
    is shown as there. `tell` gets the seconds that pictures took, and a line where one could not be made.
    """

    def __init__(self, folder: Path, monitor: StepMonitor, decode: Decode, tell: Callback) -> None:
        self._folder, self._monitor, self._decode, self._tell = folder, monitor, decode, tell
        self._effort = BestEffort(tell.on_message)
        self._curves: dict[str, Curve] = {}
        self._bands: dict[str, Band] = {}
        self._batches: dict[str, PackedBatch] = {}  # by objective, since the last picture

    def on_start(self, start: RunStart) -> None:
        self._name, self._first_step = start.recipe.name, start.first_step
        if start.first_step:
            self._curves, self._bands = history(self._folder, start.first_step)
        specs = start.recipe.objectives
        named = dict(zip(objective_names(specs), specs, strict=True))
        self._drawn = {name for name, spec in named.items() if spec.attention != "causal"} or set(named)

    def on_batches(self, step: int, objective: str, batches: Sequence[PackedBatch]) -> None:
        if objective in self._drawn and batches:
            self._batches[objective] = batches[0]

    def on_evaluation(self, step: int, result: EvaluationResult) -> None:
        for name, task in result.tasks.items():
            # The evaluation of the step that a run goes on from may be done again.
            self._curves[name] = [*_before(step, self._curves.get(name, [])), (step, task.score)]
            if (interval := task.interval) is not None:
                self._bands[name] = [*_before(step, self._bands.get(name, [])), (step, *interval)]
        texts = [
            text_value(f"{REVERSAL}/{name}/answers", answers(name, task))
            for name, task in result.tasks.items()
        ]
        self._monitor.show(step, texts)
        self._draw(step, result)

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        if kind == "plan":
            # Always as of a start's first step: it replaces what this start, cut off before a checkpoint, told earlier.
            at = self._first_step + 1
            self._monitor.show(at, [text_value(f"{DETAILS}/planned beside measured", planned_text(numbers))])

    def on_end(self, step: int, state: str) -> None:
        if state == "done":  # after an evaluation of the last step no batch is left
            self._draw(step, EvaluationResult(tasks={}))

    def _draw(self, step: int, result: EvaluationResult) -> None:
        if not result.tasks and not self._batches:
            return
        started = time.perf_counter()
        made: list[Summary.Value] = []
        # Whatever a library of pictures raises.
        self._effort.attempt(
            "TensorBoard's pictures", lambda: made.extend(self._pictures(result)), errors=Exception
        )
        self._batches.clear()
        if made:
            self._monitor.show(step, made)
            self._tell.on_numbers(step, "timing", {PICTURES_SECONDS: time.perf_counter() - started})

    def _pictures(self, result: EvaluationResult) -> Iterator[Summary.Value]:
        if result.tasks:
            run = ComparedRun(label=self._name, final=result, curves=self._curves, bands=self._bands)
            yield curves_picture(f"{REVERSAL}/curves", run)
        for name, batch in self._batches.items():
            tag = f"{DATA}/who sees whom/{name}"
            if (picture := visibility_picture(tag, batch, name, self._decode)) is not None:
                yield picture


def history(folder: Path, step: int) -> tuple[dict[str, Curve], dict[str, Band]]:
    """The headline scores of a run up to a step, and their intervals, by task; none where they cannot be read."""
    try:
        [run] = load_runs([folder])
    except UserError:
        return {}, {}
    after = step + 1
    return (
        {task: _before(after, curve) for task, curve in run.curves.items()},
        {task: _before(after, band) for task, band in run.bands.items()},
    )


def _before(step: int, points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point[0] < step]
