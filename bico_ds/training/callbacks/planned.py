"""What the planner said of a run beside what the run shows. Rank 0 only."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from bico_ds.planner.items import of_tensors
from bico_ds.planner.plan import Plan
from bico_ds.planner.ranges import Range
from bico_ds.runtime.peak_memory import PeakMemory
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, FirstRankCallback, StepReport

# Steps of each objective that count, of those that no profile slows: the first ones compile, and fill what later ones find
# filled.
FIRST, LAST = 5, 20
# An objective that is drawn seldom keeps the others waiting for at most so many steps.
_LATEST = 10 * LAST
GB = 1e9


class PlannedBesideMeasured(FirstRankCallback):
    """Once per start, when each objective had `LAST` steps or the run ends: a line, numbers (kind `plan`), and run.json's.

    `tell` shows and writes them. It must not come before this callback, since it may end first.
    """

    def __init__(self, plan: Plan, memory: PeakMemory, folder: RunFolder, tell: Callback) -> None:
        self._plan, self._memory, self._folder, self._tell = plan, memory, folder, tell
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._steps, self._told = 0, False

    def on_step(self, report: StepReport) -> None:
        if self._told:
            return
        self._memory.note()
        self._steps += 1
        if report.targets and not report.is_recorded:
            self._seconds[report.objective].append(report.seconds)
        if self._steps == _LATEST or all(
            len(self._seconds[step.objective]) >= LAST for step in self._plan.steps
        ):
            self._compare(report.step)

    def on_end(self, step: int, state: str) -> None:
        if not self._told:
            self._compare(step)

    def _compare(self, step: int) -> None:
        self._told = True
        numbers: dict[str, float] = {}
        parts: list[str] = []
        for planned in self._plan.steps:
            seconds = self._seconds[planned.objective][FIRST - 1 : LAST]
            if seconds and math.isfinite(planned.seconds.high):
                median = statistics.median(seconds)
                numbers |= _numbers(f"step_seconds/{planned.objective}", median, planned.seconds)
                parts.append(f"{planned.objective} step {_beside(median, planned.seconds, 's')}")
        if not self._steps:
            return
        on_gpu = self._plan.deployment.device.kind == "cuda"
        memory = planned_memory(self._plan)
        numbers |= _numbers("memory_bytes", self._memory.allocated, memory)
        numbers["memory_bytes/reserved"] = self._memory.reserved
        # A process on a CPU has more than tensors: caches of its libraries, the loader, compiled kernels.
        of_what = "memory of tensors" if on_gpu else "growth of the process, beside its tensors alone,"
        parts.append(f"{of_what} {_beside(self._memory.allocated / GB, memory.times(1 / GB), 'GB')}")
        self._tell.on_note(f"measured beside planned: {'; '.join(parts)}")
        self._tell.on_numbers(step, "plan", {f"plan/{name}": value for name, value in numbers.items()})
        self._record(numbers)

    def _record(self, numbers: dict[str, float]) -> None:
        device, dtype = self._plan.deployment.device, self._plan.recipe.model.dtype
        peak = device.peak_flops(dtype)
        known = {"device": device.title, "peak_flops": peak if math.isfinite(peak) else None}
        try:
            self._folder.add_to_start(plan=known | numbers)
        except OSError as error:  # a run goes on without it
            self._tell.on_message(f"run.json: the plan's numbers are not in it: {error.strerror}")


def memory_numbers(reports: Sequence[StepReport], planned: Range | None) -> dict[str, float]:
    """The newest memory that these steps know, of the fullest rank, beside that of the plan; GB (1e9 bytes).

    `planned`: `planned_memory`; None where there is no plan. Nothing where no step knows its memory.
    """
    known = [report.memory for report in reports if report.memory]
    if not known:
        return {}
    bounds = {} if planned is None else {"planned_low": planned.low, "planned_high": planned.high}
    return {f"memory/{what}_gb": amount / GB for what, amount in (known[-1] | bounds).items()}


def planned_memory(plan: Plan) -> Range:
    """Bytes that tensors take on a rank at the fullest moment."""
    moments = [of_tensors(moment.items) for moment in plan.memory.moments]
    return max(moments, key=lambda moment: moment.high)


def _numbers(what: str, measured: float, planned: Range) -> dict[str, float]:
    return {
        f"{what}/measured": measured,
        f"{what}/low": planned.low,
        f"{what}/high": planned.high,
        f"{what}/ratio": measured / planned.middle,
    }


def _beside(measured: float, planned: Range, unit: str) -> str:
    """As `0.42 s, planned 0.1 to 0.9 s (inside, 0.84 times the middle)`."""
    place = "below" if measured < planned.low else "above" if measured > planned.high else "inside"
    ratio = measured / planned.middle
    return (
        f"{measured:.3g} {unit}, planned {planned.low:.2g} to {planned.high:.2g} {unit} "
        f"({place}, {ratio:.2g} times the middle)"
    )
