"""What TensorBoard shows besides curves: pictures and answers of evaluations, and the plan beside the run. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.data.loading.batch_view import Decode
from bico_ds.evaluation.report.runs import ComparedRun, Curve, load_runs
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.training.callbacks.base import Callback, FirstRankCallback, RunStart
from bico_ds.training.callbacks.best_effort import BestEffort
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.tensorboard.pictures import curves_picture, visibility_picture
from bico_ds.training.callbacks.tensorboard.tags import DATA, DETAILS, REVERSAL
from bico_ds.training.callbacks.tensorboard.texts import answers, planned_text, text_value

PICTURES_SECONDS = "speed/pictures_seconds"


class BoardPages(FirstRankCallback):
    """Pictures and answers at each evaluation; who sees whom at an objective's first step, and at the end.

    `decode`: what a token of a picture is shown as. `tell` gets the seconds that the pictures took, and a line where one
    could not be made.
    """

    def __init__(self, folder: Path, monitor: StepMonitor, decode: Decode, tell: Callback) -> None:
        self._folder, self._monitor, self._decode, self._tell = folder, monitor, decode, tell
        self._effort = BestEffort(tell.on_message)
        self._curves: dict[str, Curve] = {}
        self._batches: dict[str, PackedBatch] = {}  # of each objective the last one
        self._shown: list[str] = []  # the objectives of which there is a picture

    def on_start(self, start: RunStart) -> None:
        self._name, self._first_step = start.recipe.name, start.first_step
        if start.first_step:
            self._curves = curves_until(self._folder, start.first_step)
        self._shown = list(start.saved.get("shown_objectives", []))

    def on_batches(self, step: int, objective: str, batches: Sequence[PackedBatch]) -> None:
        if not batches:
            return
        self._batches[objective] = batches[0]
        if objective not in self._shown:
            self._shown.append(objective)
            self._draw(step, lambda: self._visibility([objective]))

    def on_evaluation(self, step: int, result: EvaluationResult) -> None:
        for name, task in result.tasks.items():
            # The evaluation of the step that a run goes on from may be done again.
            earlier = [point for point in self._curves.get(name, []) if point[0] < step]
            self._curves[name] = [*earlier, (step, task.score)]
        texts = [
            text_value(f"{REVERSAL}/{name}/answers", answers(task)) for name, task in result.tasks.items()
        ]
        self._monitor.show(step, texts)
        if result.tasks:
            run = ComparedRun(label=self._name, final=result, curves=self._curves)
            self._draw(step, lambda: [curves_picture(f"{REVERSAL}/curves", run)])

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        if kind == "plan":
            # Always as of a start's first step: it replaces what this start, cut off before a checkpoint, told earlier.
            at = self._first_step + 1
            self._monitor.show(at, [text_value(f"{DETAILS}/planned beside measured", planned_text(numbers))])

    def on_end(self, step: int, state: str) -> None:
        if state == "done":
            self._draw(step, lambda: self._visibility(sorted(self._batches)))

    def state(self) -> dict[str, Any]:
        return {"shown_objectives": self._shown}

    def _draw(self, step: int, draw: Callable[[], Iterable[Summary.Value]]) -> None:
        started = time.perf_counter()
        made: list[Summary.Value] = []
        # Whatever a library of pictures raises.
        self._effort.attempt("TensorBoard's pictures", lambda: made.extend(draw()), errors=Exception)
        if made:
            self._monitor.show(step, made)
            self._tell.on_numbers(step, "timing", {PICTURES_SECONDS: time.perf_counter() - started})

    def _visibility(self, objectives: Sequence[str]) -> Iterator[Summary.Value]:
        for name in objectives:
            tag = f"{DATA}/who sees whom/{name}"
            if (picture := visibility_picture(tag, self._batches[name], name, self._decode)) is not None:
                yield picture


def curves_until(folder: Path, step: int) -> dict[str, Curve]:
    """The headline scores of a run up to a step, by task; none where they cannot be read."""
    try:
        [run] = load_runs([folder])
    except UserError:
        return {}
    return {task: [point for point in curve if point[0] <= step] for task, curve in run.curves.items()}
