"""Steps without any target, of which nothing is learned: a few come by chance, but a run must not consist of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bico_ds.common.errors import RunError
from bico_ds.training.callbacks.base import StepReport

# Such a step costs no more than its batch, and fewer may come by chance where a step holds a few short documents.
MOST_IN_A_ROW = 100
_ADVICE = "raise training.global_batch_bins, data.capacity or the mask rate; bico-ds inspect shows a step"


class NoTargetsError(RunError):
    """The steps of an objective have no target, and so do not change the weights."""


@dataclass(kw_only=True)
class TargetlessSteps:
    """Counts them since step 0, and of each objective those since its last step with a target; the same on all ranks."""

    total: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(saved: Mapping[str, Any]) -> TargetlessSteps:
        """What `state` returned, in a checkpoint's state; without it (an earlier program's), none are known."""
        return TargetlessSteps(**saved.get("targetless", {}))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, JSON-able."""
        return asdict(self)

    def count(self, report: StepReport) -> str | None:
        """Count a step; the line to print about it, if any: of the 1st, 2nd, 4th, 8th …, so that the console stays readable.

        Raises `NoTargetsError` after `MOST_IN_A_ROW` steps of one objective.
        """
        if report.targets:
            self.in_a_row.pop(report.objective, None)
            return None
        self.total += 1
        self.in_a_row[report.objective] = in_a_row = self.in_a_row.get(report.objective, 0) + 1
        if in_a_row >= MOST_IN_A_ROW:
            raise NoTargetsError(
                f"step {report.step}: the last {in_a_row} steps of objective '{report.objective}' had no target, "
                f"so nothing is learned from it; {_ADVICE}"
            )
        if self.total & (self.total - 1):
            return None
        before = f" ({self.total} such steps so far)" if self.total > 1 else ""
        return (
            f"step {report.step}: no target for objective '{report.objective}', so no update was made{before}"
        )

    def require_some(self, step: int, total_steps: int) -> None:
        """Raise `NoTargetsError` where a run is at its end without a single target."""
        if step == total_steps == self.total:
            raise NoTargetsError(
                f"none of the {total_steps} steps had a target: the weights are those that the run began with; {_ADVICE}"
            )
