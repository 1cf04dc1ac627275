"""How far a run is that another process trains, and how long it and those after it will take. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from bico_ds.cluster.run_status import last_numbers
from bico_ds.runtime.run_folder import RunFolder, read_state

_STEPS_OF_PACE, _SECONDS_OF_PACE = 20, 3.0  # before which there is no pace to speak of


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """A run that `command` trains into `folder`. `steps`: how many it has in the end, None where they are not known."""

    name: str
    folder: RunFolder
    command: Sequence[str]
    steps: int | None

    def steps_left(self) -> int | None:
        """Those that its folder does not record yet."""
        if self.steps is None:
            return None
        recorded = read_state(self.folder.state_file) or {}
        return max(self.steps - (recorded.get("step") or 0), 0)


@dataclass
class Watch:
    """What is seen of a start of a run, in its folder. Times are those of `time.monotonic`.

    `before`: the start that the folder recorded before this one. `first` and `last`: step and time of the first look that
    found this start at work, and of the last one that found a new step.
    """

    run: LocalRun
    began: float
    before: str | None
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    @property
    def step(self) -> int:
        return self.last[0] if self.last is not None else 0

    def look(self, now: float) -> None:
        """See how far the run is."""
        if not self.is_at_work():
            return  # what its folder holds is an earlier start's
        with contextlib.suppress(OSError):
            step = last_numbers(self.run.folder.metrics_file).get("step", 0)
            if self.last is None or step > self.last[0]:
                self.last = (step, now)
            self.first = self.first or self.last

    def is_at_work(self) -> bool:
        """Whether this start has got as far as to record itself."""
        recorded = read_state(self.run.folder.state_file) or {}
        return recorded.get("run_id") != self.before

    def seconds_per_step(self) -> float | None:
        """None before there is a pace."""
        if self.first is None or self.last is None:
            return None
        steps, seconds = self.last[0] - self.first[0], self.last[1] - self.first[1]
        return seconds / steps if steps >= _STEPS_OF_PACE and seconds >= _SECONDS_OF_PACE else None


@dataclass
class Forecast:
    """How long what is left will take, by what was seen of the newest run that had a pace; unknown before the first.

    `beside`: seconds that a run takes beside its steps: imports, start, export.
    """

    per_step: float | None = None
    beside: float = 0.0

    def learn(self, watch: Watch, *, ended: float | None = None) -> None:
        """From a run at work, or from one that has `ended`."""
        pace = watch.seconds_per_step()
        if pace is None or watch.first is None:
            return
        before = watch.first[1] - watch.began
        trained = pace * (watch.step - watch.first[0])
        self.per_step, self.beside = pace, before if ended is None else ended - watch.began - trained

    def of_run(self, watch: Watch, now: float) -> float | None:
        """Seconds that the run which is watched still takes."""
        if self.per_step is None or watch.run.steps is None:
            return None
        if watch.last is None:
            steps = watch.run.steps_left() or 0
            return max(self.beside - (now - watch.began), 0.0) + steps * self.per_step
        return max((watch.run.steps - watch.step) * self.per_step - (now - watch.last[1]), 0.0)

    def of_later(self, runs: Sequence[LocalRun]) -> float | None:
        """Seconds that runs take which have not begun."""
        steps = [run.steps_left() for run in runs]
        if self.per_step is None or None in steps:
            return None
        return sum(self.beside + (left or 0) * self.per_step for left in steps)
