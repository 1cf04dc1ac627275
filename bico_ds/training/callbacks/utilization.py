"""Model FLOPs utilization (MFU) of real steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bico_ds.config.sections.model import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.flops import useful_flops
from bico_ds.planner.plan import Plan
from bico_ds.training.callbacks.base import StepReport

TAG = "speed/mfu"


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Useful operations per second of wall time, as a share of `peak`: that of all ranks' devices together, per second.

    `description`: what the peak is, for whoever reads the number.
    """

    architecture: Architecture
    model: ModelSpec
    peak: float
    description: str

    @classmethod
    def planned(cls, plan: Plan) -> Utilization | None:
        """By the devices of a plan; None where no peak of theirs is known."""
        device, ranks, model = plan.deployment.device, plan.deployment.ranks, plan.recipe.model
        peak = ranks * device.peak_flops(model.dtype)
        if not math.isfinite(peak):
            return None
        known = (
            f"a matrix product in {model.dtype} that rank 0 timed at the start"
            if device.kind == "cpu"
            else f"{device.title}, dense {model.dtype} products by data sheet"
        )
        return cls(
            architecture=plan.architecture,
            model=model,
            peak=peak,
            description="Model FLOPs utilization: useful operations (no recomputation, visible pairs of query and key only) "
            f"per second of wall time, as a share of a peak of {peak / 1e12:,.3g} TFLOP/s = {known} x {ranks} ranks.",
        )

    def of(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """The utilization of all these steps and of each objective's, by tag; without those whose pairs are not known."""
        counted = [report for report in reports if report.pairs is not None]
        names = dict.fromkeys(report.objective for report in counted)
        groups = {TAG: counted} | {
            f"{TAG}/{name}": [report for report in counted if report.objective == name] for name in names
        }
        return {tag: self._mean(group) for tag, group in groups.items() if group}

    def _mean(self, reports: Sequence[StepReport]) -> float:
        useful = sum(
            useful_flops(
                self.architecture,
                self.model,
                rows=report.kept_tokens,
                targets=report.targets,
                pairs=report.pairs or 0,
            )
            for report in reports
        )
        return useful / (self.peak * sum(report.seconds for report in reports))
