"""The console: one live progress display on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from bico_ds.common.progress import Progress
from bico_ds.config.objectives.table import objective_names
from bico_ds.training.callbacks.base import FirstRankCallback, RunStart, StepReport


class ConsoleProgress(FirstRankCallback):
    """Shows where the run is; before `on_start` it only prints messages."""

    def __init__(self, console: Console | None = None) -> None:
        name, numbers = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[text]}")
        columns = (
            name,
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            numbers,
        )
        self._progress = Progress(console or Console(soft_wrap=True), *columns)
        self._losses: dict[str, float] = {}

    def on_start(self, start: RunStart) -> None:
        self._first, self._total = start.first_step + 1, start.total_steps
        specs = start.recipe.objectives
        self._colours = dict(zip(objective_names(specs), (s.monitor.colour for s in specs), strict=True))
        self._progress.begin(start.recipe.name, total=start.total_steps, completed=start.first_step)
        self._progress.start()

    def on_step(self, report: StepReport) -> None:
        if report.targets:
            self._losses[report.objective] = report.loss
        losses = "  ".join(
            f"[{self._colours[name]}]{name}[/] {loss:.3f}" for name, loss in sorted(self._losses.items())
        )
        norm = f"norm {report.grad_norm:.2f}" if report.targets else "no target"
        speed = report.represented_tokens / max(report.seconds, 1e-9)
        numbers = f"loss {losses}  {norm}  lr {report.learning_rate:.1e}  {speed:,.0f} tokens/s"
        line = f"step {report.step}/{self._total}  {Text.from_markup(numbers).plain}"
        at_once = report.step in (self._first, self._total)
        self._progress.update(report.step, line, text=numbers, at_once=at_once)

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        if kind == "evaluation":
            shown = {
                key.split("/", 1)[1]: value for key, value in numbers.items() if key.endswith("/headline")
            }
            text = "  ".join(f"{key.removesuffix('/headline')} {value:.3f}" for key, value in shown.items())
            if shown:
                self.on_message(f"step {step}  evaluation  {text}")

    def on_message(self, text: str) -> None:
        self._progress.print(text)

    def on_end(self, step: int, state: str) -> None:
        self._progress.stop()
        self.on_message(f"{state} after step {step}")
