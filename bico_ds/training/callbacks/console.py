"""The console: on a terminal one live line, plain lines elsewhere and in rank 0's log. Rank 0 only."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bico_ds.common.progress import SECONDS_BETWEEN_LINES
from bico_ds.config.objectives.table import objective_names
from bico_ds.runtime.output.process_output import TOLD
from bico_ds.training.callbacks.base import FirstRankCallback, RunStart, StepReport
from bico_ds.training.callbacks.utilization import TAG as MFU
from bico_ds.training.callbacks.utilization import Utilization

_logger = logging.getLogger(__name__)

_RECENT = 20  # steps over which rates are taken
_BETWEEN_DRAWINGS = 1.0  # seconds: drawing the live line takes the loop a millisecond


class ConsoleProgress(FirstRankCallback):
    """Shows where the run is; before `on_start` it only prints messages.

    `utilization`: None where no peak of the devices is known; then there is no MFU. `quiet`: messages and evaluations alone.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        utilization: Utilization | None = None,
        quiet: bool = False,
    ) -> None:
        self._console = console or Console(soft_wrap=True)
        self._utilization, self._quiet = utilization, quiet
        self._losses: dict[str, float] = {}
        self._recent: deque[StepReport] = deque(maxlen=_RECENT)
        self._pace = _Pace()
        self._last_line = self._last_drawing = time.monotonic()
        self._live: Live | None = None

    def on_start(self, start: RunStart) -> None:
        self._first, self._total = start.first_step + 1, start.total_steps
        self._name, specs = start.recipe.name, start.recipe.objectives
        self._colours = dict(zip(objective_names(specs), (s.monitor.colour for s in specs), strict=True))
        self._show_banner(start.banner)
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._quiet:
            self._live = Live(
                console=self._console,
                get_renderable=self._live_line,
                auto_refresh=False,  # nothing changes between steps, and a thread's share of them would not be counted
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # else it is a file, which errors are to be in
            )
            self._live.start(refresh=True)
            atexit.register(self._live.stop)  # a run that fails ends without `on_end`
            # It would stay hidden where the process ends at once, as a rank that fails does.
            self._console.show_cursor(True)

    def on_step(self, report: StepReport) -> None:
        self._recent.append(report)
        self._pace.step()
        if report.targets:
            self._losses[report.objective] = report.loss
        now, is_end = time.monotonic(), report.step in (self._first, self._total)
        if is_end or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(self._plain_line(), shown=self._live is None and not self._quiet)
        if self._live is not None and (is_end or now - self._last_drawing >= _BETWEEN_DRAWINGS):
            self._last_drawing = now
            self._live.refresh()

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        if kind == "evaluation":
            shown = {
                key.split("/", 1)[1]: value for key, value in numbers.items() if key.endswith("/headline")
            }
            text = "  ".join(f"{key.removesuffix('/headline')} {value:.3f}" for key, value in shown.items())
            if shown:
                self.on_message(f"step {step}  evaluation  {text}")

    def on_message(self, text: str) -> None:
        self._say(text)

    def on_note(self, text: str) -> None:
        self._say(text, shown=not self._quiet)

    def on_end(self, step: int, state: str) -> None:
        if self._live is not None:
            self._live.stop()
            if self._recent:
                self._console.print(self._plain_line(), highlight=False, markup=False, soft_wrap=False)
        self._say(f"{state} after step {step}")

    def _say(self, text: str, *, shown: bool = True) -> None:
        if shown:
            if self._live is not None and self._live.is_started:
                self._live.refresh()  # it is drawn below the text again, and must not be of an earlier step
            # Words stay whole on a terminal; elsewhere lines do, which programs may read.
            whole_lines = not self._console.is_terminal
            self._console.print(text, highlight=False, markup=False, soft_wrap=whole_lines)
        _logger.info("%s", text, extra=TOLD)

    def _show_banner(self, banner: Sequence[tuple[str, str]]) -> None:
        for line in banner_lines(banner):
            self._say(line, shown=not (self._quiet or self._console.is_terminal))
        if banner and self._console.is_terminal and not self._quiet:
            self._console.print(banner_table(banner))

    def _plain_line(self) -> str:
        """Of the last step, for whoever reads it later, too."""
        report = self._recent[-1]
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in sorted(self._losses.items()))
        norm = f"norm {report.grad_norm:.2f}" if report.targets else "no target"
        parts = [
            time.strftime("%H:%M:%S"),
            f"step {report.step}/{self._total}",
            f"loss {losses}",
            norm,
            f"lr {report.learning_rate:.1e}",
            *self._rates(),
            self._left(report.step),
        ]
        return "  ".join(filter(None, parts))

    def _live_line(self) -> Text:
        """As much as there is room for, the most important first; a loss that is not of the last step is dim."""
        if not self._recent:
            return Text(f"{self._name}  step {self._first}/{self._total} …", no_wrap=True)
        report = self._recent[-1]
        where = Text(f"step {report.step}/{self._total}", style="bold")
        losses = {name: self._live_loss(name, report.objective) for name in sorted(self._losses)}
        speed, *rates = map(Text, self._rates())
        left = list(map(Text, filter(None, [self._left(report.step)])))
        rest = [Text(f"lr {report.learning_rate:.1e}"), Text(self._name)]
        of_last = [loss for name, loss in losses.items() if name == report.objective]
        of_others = [loss for name, loss in losses.items() if name != report.objective]
        return _fitted(
            [where, *losses.values(), speed, *rates, *left, *rest],
            [where, *of_last, *left, speed, *of_others, *rates, *rest],
            self._console.width,
        )

    def _live_loss(self, name: str, last: str) -> Text:
        """With the word before the first one, as in plain lines; `last`: the objective of the last step."""
        colour, numbers = ("dim", "dim") if name != last else (self._colours[name], "")
        begin = "loss " if name == min(self._losses) else ""
        return Text.assemble(begin, (name, colour), " ", (f"{self._losses[name]:.3f}", numbers))

    def _rates(self) -> list[str]:
        """Tokens per second, MFU where it is known, and the share of the time that data was waited for."""
        seconds = max(sum(report.seconds for report in self._recent), 1e-9)
        speed = sum(report.represented_tokens for report in self._recent) / seconds
        wait = sum(report.wait_seconds for report in self._recent) / seconds
        found = self._utilization.of(self._recent) if self._utilization is not None else {}
        mfu = [f"MFU {found[MFU]:.1%}"] if MFU in found else []
        return [f"{speed:,.0f} tokens/s", *mfu, f"wait {wait:.1%}"]

    def _left(self, step: int) -> str:
        seconds = self._pace.seconds_for(self._total - step)
        return "" if seconds is None else f"ETA {timedelta(seconds=round(seconds))}"


@dataclass
class _Pace:
    """How long steps take, with evaluations and checkpoints between them; the first step, which compiles, does not count."""

    steps: int = 0
    began: float = 0.0
    last: float = 0.0

    def step(self) -> None:
        """A step is reported."""
        self.last = time.monotonic()
        self.began = self.began or self.last
        self.steps += 1

    def seconds_for(self, steps: int) -> float | None:
        """How long so many more will take; None before the second step."""
        return None if self.steps < 2 else (self.last - self.began) / (self.steps - 1) * steps


def banner_lines(banner: Sequence[tuple[str, str]]) -> list[str]:
    """What is to run, a line each, for files and programs."""
    width = max((len(label) for label, _ in banner), default=0)
    return [f"{label:{width}}  {text}" for label, text in banner]


def banner_table(banner: Sequence[tuple[str, str]]) -> Table:
    """What is to run, a row each; long rows go on below their beginning."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in banner:
        table.add_row(label, Text(text))
    return table


def _fitted(parts: Sequence[Text], by_importance: Sequence[Text], width: int) -> Text:
    """The parts in their order on one line, without those that have no room behind more important ones."""
    kept: set[int] = set()
    room = width + 2
    for part in by_importance:
        if part.cell_len + 2 <= room:
            room -= part.cell_len + 2
            kept.add(id(part))
    line = Text("  ").join(part for part in parts if id(part) in kept)
    line.no_wrap, line.overflow = True, "crop"
    return line
