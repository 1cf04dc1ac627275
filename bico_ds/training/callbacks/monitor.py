"""Numbers into files: metrics.jsonl, TensorBoard, and through DeepSpeed's monitor CSV and W&B. Rank 0 only."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter

from bico_ds.common.files import write_atomically
from bico_ds.config.load import dump_recipe
from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import MonitorSpec, Recipe
from bico_ds.model.deepspeed_engine import EventWriter
from bico_ds.runtime.run_folder import RunFolder, split_metrics
from bico_ds.training.callbacks.base import FirstRankCallback, RunStart, StepReport
from bico_ds.training.callbacks.slowest import SlowestRank
from bico_ds.training.callbacks.utilization import TAG as MFU
from bico_ds.training.callbacks.utilization import Utilization
from bico_ds.training.callbacks.work import SHARE, SHARED, ObjectiveWork


class StepMonitor(FirstRankCallback):
    """Every `every_steps` steps, writes what `_summarize` makes of the steps since the last time; other numbers at once.

    `utilization`: None where no peak of the devices is known; then there is no MFU. `work`: adds up what was done, and gets
    each step before this callback does. `slowest`: None of a single rank.
    """

    def __init__(
        self,
        spec: MonitorSpec,
        folder: RunFolder,
        deepspeed_monitor: EventWriter | None,
        utilization: Utilization | None = None,
        work: ObjectiveWork | None = None,
        slowest: SlowestRank | None = None,
    ) -> None:
        self._spec, self._utilization, self._work = spec, utilization, work
        self._slowest = slowest
        self._folder = folder
        self._deepspeed_monitor = deepspeed_monitor
        self._pending: list[StepReport] = []

    def on_start(self, start: RunStart) -> None:
        first = start.first_step
        self._pending = [StepReport(**report) for report in start.saved.get("unwritten_steps", [])]
        keep_lines_until(self._folder.metrics_file, first)
        self._metrics = open(self._folder.metrics_file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        # DeepSpeed's engine made the folder, but an earlier run's files may have been set aside since.
        if self._spec.csv:
            (self._folder.csv / start.recipe.name).mkdir(parents=True, exist_ok=True)
        self._writer = None
        if self._spec.tensorboard:
            # Hide the steps that an earlier start wrote after the checkpoint resumed from (without one: all).
            self._writer = SummaryWriter(str(self._folder.tensorboard), purge_step=first + 1)
            self._writer.add_custom_scalars(charts(start.recipe))
            self._writer.add_text("recipe", f"```yaml\n{dump_recipe(start.recipe)}```", first)
            self._writer.add_text("summary", f"```json\n{json.dumps(start.summary, indent=1)}\n```", first)

    def on_step(self, report: StepReport) -> None:
        self._pending.append(report)
        if report.step % self._spec.every_steps == 0:
            self._write_pending()

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        # An evaluation may lie between two lines of steps, and is one of the work done by then.
        done = self._work.numbers() if kind == "evaluation" and self._work is not None else {}
        self._write_line(step, kind, numbers | done)
        self._write_events(step, numbers)

    def on_message(self, text: str) -> None: ...

    def on_end(self, step: int, state: str) -> None:
        if self._pending and state == "done":  # else the checkpoint keeps them
            self._write_pending()
        self._metrics.close()
        if self._writer is not None:
            self._writer.close()

    def state(self) -> dict[str, Any]:
        return {"unwritten_steps": [asdict(report) for report in self._pending]}

    def _write_pending(self) -> None:
        numbers = _summarize(self._pending)
        if self._utilization is not None:
            numbers |= self._utilization.of(self._pending)
        if self._work is not None:
            numbers |= self._work.numbers()
        if self._slowest is not None:
            numbers |= self._slowest.of(self._pending)
        step = self._pending[-1].step
        self._write_line(step, "train", numbers)
        self._write_events(step, numbers)
        self._pending.clear()

    def _write_line(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        self._metrics.write(json.dumps({"step": step, "kind": kind, **numbers}, allow_nan=False) + "\n")

    def _write_events(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is not None:
            for tag, value in numbers.items():
                self._add_scalar(self._writer, tag, value, step)
            self._writer.flush()
        if self._deepspeed_monitor is not None and self._deepspeed_monitor.enabled:
            self._deepspeed_monitor.write_events([(tag, value, step) for tag, value in numbers.items()])

    def _add_scalar(self, writer: SummaryWriter, tag: str, value: float, step: int) -> None:
        if self._utilization is None or not tag.startswith(MFU):
            writer.add_scalar(tag, value, step)
            return
        # What `add_scalar` writes, with the description that it has no argument for: TensorBoard shows it beside the chart.
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(plugin_data=plugin, summary_description=self._utilization.description)
        described = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
        writer._get_file_writer().add_summary(Summary(value=[described]), step)


def charts(recipe: Recipe) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's CUSTOM SCALARS: losses in the charts that the objectives' specs name, tasks, and speed."""
    losses: dict[str, list[str]] = defaultdict(list)
    losses["loss"].append("loss/all")
    for name, spec in zip(objective_names(recipe.objectives), recipe.objectives, strict=True):
        losses[spec.monitor.chart].append(f"loss/{name}")
    by_source = [
        f"loss/{name}/{recipe.data.source_names[number]}"
        for name, spec in zip(objective_names(recipe.objectives), recipe.objectives, strict=True)
        for number in recipe.data.source_numbers(spec.sources)
    ]
    tags = {
        **losses,
        **({"loss by source": by_source} if len(recipe.data.sources) > 1 else {}),
        **({"divergence from the start model": ["loss/divergence"]} if recipe.retention is not None else {}),
        "reversal tasks": [r"evaluation/.*/headline"],
        **({"retention": [r"evaluation/text/.*/times_base"]} if recipe.evaluation.texts else {}),
        "tokens per second": [r"speed/.*_tokens_per_second"],
        "MFU": [f"{MFU}.*"],
        **(
            {f"share of {what}": [f"{SHARE}/{what}/.*"] for what in SHARED}
            if len(recipe.objectives) > 1
            else {}
        ),
    }
    return {"bico_ds": {chart: ["Multiline", names] for chart, names in tags.items()}}


def _summarize(reports: list[StepReport]) -> dict[str, float]:
    """Mean losses over all steps, by objective and by source; rates over rank 0's wall time.

    A step counts by the weights of its targets' losses, and in `loss/all`, since only one objective's weights are of one
    measure, by the number of its targets. The learning rate is the last one.

    Losses and norms are those of the steps that made an update, and absent where none did; so are spikes.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    # A skipped step's loss may not be a number. Checkpoints of before may hold updates without a target.
    applied = [report for report in reports if report.applied and report.targets]
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
    seconds = sum(report.seconds for report in reports)
    numbers = {tag: total / count for tag, (total, count) in sums.items()}
    if applied:
        numbers["optimizer/grad_norm"] = sum(report.grad_norm for report in applied) / len(applied)
    spikes = sum(report.is_spike for report in reports)
    if spikes:
        numbers["optimizer/spikes"] = spikes
    for source, counts in reports[-1].sources.items():
        numbers |= {f"data/{source}/{what}": count for what, count in counts.items()}
    represented = sum(report.represented_tokens for report in reports)
    return numbers | {
        "optimizer/learning_rate": reports[-1].learning_rate,
        "optimizer/skipped_steps": sum(not report.applied for report in reports),
        "speed/kept_tokens_per_second": sum(report.kept_tokens for report in reports) / seconds,
        "speed/represented_tokens_per_second": represented / seconds,
        "speed/step_seconds": seconds / len(reports),
        "speed/data_wait_share": sum(report.wait_seconds for report in reports) / seconds,
        "data/fill": sum(report.fill for report in reports) / len(reports),
    }


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run writes again, and a last line that a crash cut."""
    kept, later = split_metrics(path, step)
    if later:
        write_atomically(path, "".join(kept))
