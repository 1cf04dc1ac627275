"""How far a long piece of work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich import progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows one task after another; silent where it is not `enabled`, as on all ranks but the first.

    `columns` are those of the bar. A column can show the `text` of `update` as `{task.fields[text]}`; `transient` removes
    the bar at the end. Use it as a context manager, or call `start` and `stop`.
    """

    def __init__(
        self,
        console: Console,
        *columns: progress.ProgressColumn,
        enabled: bool = True,
        transient: bool = False,
    ) -> None:
        self._console, self._enabled = console, enabled
        self._bar: progress.Progress | None = None
        if enabled and console.is_terminal:
            self._bar = progress.Progress(*columns, console=console, transient=transient)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, *, total: int | None, completed: int = 0) -> None:
        """Begin a task; the first plain line comes `SECONDS_BETWEEN_LINES` later."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, completed=completed, text="")

    def update(self, completed: int, line: str, *, text: str = "", at_once: bool = False) -> None:
        """Show that so much of the task is done: on the bar with `text`, which may have rich's markup; elsewhere as `line`,
        if it is time for one, or `at_once`.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, text=text)
        elif at_once or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._enabled:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
