"""How far an ingestion is."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from bico_ds.common.progress import Progress


class IngestProgress(Progress):
    """Shows shards done, documents and tokens on stderr."""

    def __init__(self, shards: int, *, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        super().__init__(Console(stderr=True), *columns, enabled=enabled, transient=True)
        self._shards, self._started = shards, time.monotonic()
        self.begin("tokenizing", total=shards)

    def count(self, shards: int, documents: int, tokens: int) -> None:
        """Show counts so far; `documents` and `tokens` count this run's work only."""
        rate = tokens / max(time.monotonic() - self._started, 1e-9)
        text = (
            f"{shards}/{self._shards} shards, {documents:,} documents, {tokens / 1e6:,.1f} M tokens, "
            f"{rate:,.0f} tokens/s"
        )
        self.update(shards, f"tokenizing: {text}", text=text)
