"""The console: one live progress display on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bico_ds.config.objectives.table import objective_names
from bico_ds.training.callbacks.base import FirstRankCallback, RunStart, StepReport

PLAIN_SECONDS = 10.0  # between two plain lines


class ConsoleProgress(FirstRankCallback):
    """Shows where the run is; before `on_start` it only prints messages."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._progress: Progress | None = None
        self._last_line = 0.0
        self._losses: dict[str, float] = {}

    def on_start(self, start: RunStart) -> None:
        self._total = start.total_steps
        specs = start.recipe.objectives
        self._colours = dict(zip(objective_names(specs), (s.monitor.colour for s in specs), strict=True))
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=self.console,
            )  # fmt: skip
            self._task = self._progress.add_task(
                start.recipe.name, total=start.total_steps, completed=start.first_step, numbers=""
            )
            self._progress.start()

    def on_step(self, report: StepReport) -> None:
        self._losses[report.objective] = report.loss
        losses = "  ".join(
            f"[{self._colours[name]}]{name}[/] {loss:.3f}" for name, loss in sorted(self._losses.items())
        )
        speed = report.represented_tokens / max(report.seconds, 1e-9)
        numbers = f"loss {losses}  norm {report.grad_norm:.2f}  lr {report.learning_rate:.1e}  {speed:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=report.step, numbers=numbers)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or report.step in (1, self._total):
            self._last_line = time.monotonic()
            self.console.print(f"step {report.step}/{self._total}  {numbers}", highlight=False)

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        if kind == "evaluation":
            shown = {
                key.split("/", 1)[1]: value for key, value in numbers.items() if key.endswith("/headline")
            }
            text = "  ".join(f"{key.removesuffix('/headline')} {value:.3f}" for key, value in shown.items())
            self.on_message(f"step {step}  evaluation  {text}")

    def on_message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def on_end(self, step: int, state: str) -> None:
        if self._progress is not None:
            self._progress.stop()
        self.on_message(f"{state} after step {step}")
