"""How far an ingestion is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class IngestProgress:
    """Context manager that shows shards done, documents and tokens; silent with ``enabled=False``."""

    def __init__(self, shards: int, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._shards, self._console, self._enabled = shards, console, enabled
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            columns = (
                TextColumn("tokenizing"),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=shards, said="")

    def __enter__(self) -> IngestProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line."""
        if self._enabled:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def update(self, shards: int, documents: int, tokens: int) -> None:
        """Show counts so far; `documents` and `tokens` count this run's work only."""
        now = time.monotonic()
        rate = tokens / max(now - self._started, 1e-9)
        said = (
            f"{shards}/{self._shards} shards, {documents:,} documents, {tokens / 1e6:,.1f} M tokens, "
            f"{rate:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=shards, said=said)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"tokenizing: {said}")
