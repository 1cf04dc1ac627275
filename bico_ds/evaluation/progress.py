"""Progress of an evaluation on the first rank: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bico_ds.evaluation.result_file import Part
from bico_ds.evaluation.scoring.share import PromptShare

_PLAIN_SECONDS = 10.0  # between two plain lines


class PromptProgress:
    """Counts this rank's prompts; all ranks have as many, but for one."""

    def __init__(self, console: Console, share: PromptShare) -> None:
        self._console, self._share = console, share
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not (share.is_first and console.is_terminal))
        self._name, self._done, self._total, self._last_line = "", 0, 0, 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, part: Part) -> None:
        self._name, self._done = f"{part.section} {part.name}", 0
        self._total = -(-part.size // self._share.world_size)
        self._task = self._bar.add_task(self._name, total=self._total or None)
        self._last_line = time.monotonic()
        self._say(f"{self._name} …")

    def advance(self, prompts: int) -> None:
        self._done += prompts
        self._bar.advance(self._task, prompts)
        if time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._say(f"{self._name}  {self._done}/{self._total}")

    def _say(self, line: str) -> None:
        if self._share.is_first and not self._console.is_terminal:
            self._console.print(line, highlight=False)
