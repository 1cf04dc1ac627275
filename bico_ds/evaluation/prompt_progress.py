"""Progress of an evaluation, shown on the first rank."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from bico_ds.common.progress import Progress
from bico_ds.evaluation.result_file import Part
from bico_ds.evaluation.scoring.share import PromptShare


class PromptProgress(Progress):
    """Counts this rank's prompts; all ranks have as many, but for one."""

    def __init__(self, console: Console, share: PromptShare) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(console, *columns, enabled=share.is_first)
        self._world_size = share.world_size

    def begin_part(self, part: Part) -> None:
        self._name, self._done = f"{part.section} {part.name}", 0
        self._total = -(-part.size // self._world_size)
        self.begin(self._name, total=self._total or None)
        self.update(0, f"{self._name} …", at_once=True)

    def advance(self, prompts: int) -> None:
        self._done += prompts
        self.update(self._done, f"{self._name}  {self._done}/{self._total}")
