"""Numbers into files: metrics.jsonl, TensorBoard, and through DeepSpeed's monitor CSV and W&B. Rank 0 only."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.common.appended_file import AppendedFile
from bico_ds.common.files import write_atomically
from bico_ds.config.sections.monitor import MonitorSpec
from bico_ds.model.deepspeed_engine import EventWriter
from bico_ds.planner.ranges import Range
from bico_ds.runtime.run_folder import RunFolder, split_metrics
from bico_ds.training.callbacks.base import FirstRankCallback, RunStart, StepReport
from bico_ds.training.callbacks.best_effort import BestEffort
from bico_ds.training.callbacks.deepspeed_monitor import bear_failures
from bico_ds.training.callbacks.planned import memory_numbers
from bico_ds.training.callbacks.slowest import SlowestRank
from bico_ds.training.callbacks.stopwatch import Stopwatch
from bico_ds.training.callbacks.tensorboard.about import About
from bico_ds.training.callbacks.tensorboard.board import Board
from bico_ds.training.callbacks.tensorboard.charts import as_summary, charts
from bico_ds.training.callbacks.utilization import Utilization
from bico_ds.training.callbacks.work import ObjectiveWork


class StepMonitor(FirstRankCallback):
    """Every `every_steps` steps, and at the last one, writes what `_summarize` makes of the steps since the last time; other
    numbers at once. Steps that a stop leaves unwritten are kept by the checkpoint. TensorBoard gets what came within a
    second together, and at the latest where training pauses.

    What cannot be written does not end the run: it waits until it can be, and `tell` gets a line of both.
    `utilization`: None where no peak of the devices is known; then there is no MFU. `work`: adds up what was done, and gets
    each step before this callback does. `slowest`: None of a single rank. `ranks`: how many there are. `planned_memory`:
    what a rank's tensors take, in bytes; None without a plan. `watch`: runs while steps are shown and written.
    """

    def __init__(
        self,
        spec: MonitorSpec,
        folder: RunFolder,
        deepspeed_monitor: EventWriter | None,
        utilization: Utilization | None = None,
        work: ObjectiveWork | None = None,
        slowest: SlowestRank | None = None,
        tell: Callable[[str], None] = lambda text: None,
        *,
        ranks: int = 1,
        planned_memory: Range | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self._spec, self._utilization, self._work = spec, utilization, work
        self._slowest, self._ranks, self._planned_memory = slowest, ranks, planned_memory
        self._watch, self._earlier = watch, 0  # steps of an earlier start, among those that are pending
        self._folder = folder
        self._deepspeed_monitor = deepspeed_monitor
        self._pending: list[StepReport] = []
        self._effort, self._tell = BestEffort(tell), tell
        self._metrics = AppendedFile(folder.metrics_file, root=folder.path)
        self._is_cut = False  # metrics.jsonl: before the first line of this start
        self._board: Board | None = None

    def on_start(self, start: RunStart) -> None:
        first = start.first_step
        self._pending = [StepReport(**report) for report in start.saved.get("unwritten_steps", [])]
        self._earlier = len(self._pending)
        if self._watch is not None:
            self._watch.take()  # messages of the start are no step's
        self._first_step, self._last_step = first, start.total_steps
        self._max_grad_norm = start.recipe.training.max_grad_norm
        if self._deepspeed_monitor is not None and self._deepspeed_monitor.enabled:
            csv = self._folder.csv / start.recipe.name
            until = first or -1  # a start from the beginning evaluates step 0 anew
            bear_failures(
                self._deepspeed_monitor, csv, root=self._folder.path, until=until, effort=self._effort
            )
        if self._spec.tensorboard:
            layout = charts(start.recipe, has_mfu=self._utilization is not None)
            self._board = Board(
                self._folder,
                first_step=first,
                about=About(self._folder, start, as_summary(layout)),
                mfu=self._utilization.description if self._utilization is not None else "",
                tell=self._tell,
            )
        self._write_waiting()

    def on_step(self, report: StepReport) -> None:
        self._pending.append(report)
        if report.step % self._spec.every_steps == 0 or report.step == self._last_step:
            self._write_pending()

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        # An evaluation may lie between two lines of steps, and is one of the work done by then.
        done = self._work.numbers() if kind == "evaluation" and self._work is not None else {}
        self._write(step, kind, numbers | done, charted=numbers)

    def show(self, step: int, values: Sequence[Summary.Value]) -> None:
        """Write texts and pictures of a step, for TensorBoard alone."""
        if self._board is not None:
            self._board.show(step, values)
            self._write_waiting()

    def on_message(self, text: str) -> None: ...

    def on_pause(self) -> None:
        self._write_waiting()

    def on_end(self, step: int, state: str) -> None:
        if self._board is not None and state == "done":
            self._board.end()
        self._write_waiting()
        for file in (self._metrics, *([self._board.file] if self._board is not None else [])):
            if file.missing:
                self._tell(f"WARNING: {file.path} lacks {file.missing:,} records, which could not be written")

    def state(self) -> dict[str, Any]:
        return {"unwritten_steps": [asdict(report) for report in self._pending]}

    def _write_pending(self) -> None:
        numbers = _summarize(self._pending, ranks=self._ranks, max_grad_norm=self._max_grad_norm)
        numbers |= memory_numbers(self._pending, self._planned_memory)
        if self._watch is not None:
            since = sum(report.seconds for report in self._pending[self._earlier :])
            # What this line costs is of the next one.
            numbers["speed/monitor_share"] = self._watch.take() / since
        if self._utilization is not None:
            numbers |= self._utilization.of(self._pending)
        if self._work is not None:
            numbers |= self._work.numbers()
        if self._slowest is not None:
            numbers |= self._slowest.of(self._pending)
        step = self._pending[-1].step
        self._write(step, "train", numbers, charted=numbers, at_once=False)
        self._pending.clear()
        self._earlier = 0

    def _write(
        self,
        step: int,
        kind: str,
        numbers: dict[str, float],
        *,
        charted: dict[str, float],
        at_once: bool = True,
    ) -> None:
        """`at_once`: also into TensorBoard's file, which is not written for every line of fast steps."""
        # JSON has no NaN and no infinity; a perplexity may be either.
        known = {tag: value for tag, value in numbers.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "kind": kind, **known}, allow_nan=False)
        self._metrics.add(line.encode() + b"\n")
        if self._board is not None:
            self._board.add(step, kind, known)
        self._write_waiting(at_once=at_once)
        if self._deepspeed_monitor is not None and self._deepspeed_monitor.enabled:
            self._deepspeed_monitor.write_events([(tag, value, step) for tag, value in charted.items()])

    def _write_waiting(self, *, at_once: bool = True) -> None:
        self._effort.attempt(self._metrics.path.name, self._write_lines)
        if self._board is not None and (at_once or self._board.is_due):
            self._effort.attempt("TensorBoard's file", self._board.write_waiting)

    def _write_lines(self) -> None:
        if not self._is_cut:
            # A start from the beginning evaluates step 0 anew.
            keep_lines_until(self._metrics.path, self._first_step or -1)
            self._metrics.path.touch()
            self._is_cut = True
        self._metrics.write_waiting()


def _summarize(reports: list[StepReport], *, ranks: int, max_grad_norm: float) -> dict[str, float]:
    """Mean losses over all steps; rates over rank 0's wall time, in which pauses (checkpoints, evaluations) are not.

    The learning rate is the last one. Losses, norms and the share that was clipped are those of the steps that made an
    update, and absent where none did; so are spikes.
    """
    # A skipped step's loss may not be a number. Checkpoints of before may hold updates without a target.
    applied = [report for report in reports if report.applied and report.targets]
    numbers = _losses(applied)
    if applied:
        numbers["optimizer/grad_norm"] = sum(report.grad_norm for report in applied) / len(applied)
    if applied and max_grad_norm:
        clipped = sum(report.grad_norm > max_grad_norm for report in applied)
        numbers["optimizer/clipped_share"] = clipped / len(applied)
    spikes = sum(report.is_spike for report in reports)
    if spikes:
        numbers["optimizer/spikes"] = spikes
    for source, counts in reports[-1].sources.items():
        numbers |= {f"data/{source}/{what}": count for what, count in counts.items()}
    return (
        numbers
        | {
            "optimizer/learning_rate": reports[-1].learning_rate,
            "optimizer/skipped_steps": sum(not report.applied for report in reports),
            "data/fill": sum(report.fill for report in reports) / len(reports),
        }
        | _speeds(reports, ranks)
    )


def _losses(applied: list[StepReport]) -> dict[str, float]:
    """Mean losses over all steps, by objective and by source.

    A step counts by the weights of its targets' losses, and in `loss/all`, since only one objective's weights are of one
    measure, by the number of its targets.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for report in applied:
        parts: dict[str, tuple[float, float]] = {
            "loss/all": (report.loss, report.targets),
            f"loss/{report.objective}": (report.loss, report.weight or report.targets),
        }
        for source, (loss, weight) in report.source_losses.items():
            parts[f"loss/{report.objective}/{source}"] = (loss, weight)
        if report.divergence is not None:
            # Steps count alike: how many rows each compared is not kept.
            parts["loss/divergence"] = (report.divergence, 1)
        for tag, (mean, weight) in parts.items():
            sums[tag][0] += mean * weight
            sums[tag][1] += weight
    return {tag: total / count for tag, (total, count) in sums.items()}


def _speeds(reports: list[StepReport], ranks: int) -> dict[str, float]:
    """Rates over the wall time of these steps; per rank where its share of the tokens is the mean one."""
    seconds = sum(report.seconds for report in reports)
    kept = sum(report.kept_tokens for report in reports) / seconds
    represented = sum(report.represented_tokens for report in reports) / seconds
    return {
        "speed/kept_tokens_per_second": kept,
        "speed/represented_tokens_per_second": represented,
        "speed/kept_tokens_per_second_per_rank": kept / ranks,
        "speed/represented_tokens_per_second_per_rank": represented / ranks,
        "speed/step_seconds": seconds / len(reports),
        "speed/data_wait_share": sum(report.wait_seconds for report in reports) / seconds,
    }


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run writes again, and a last line that a crash cut."""
    kept, later = split_metrics(path, step)
    if later:
        write_atomically(path, "".join(kept))
