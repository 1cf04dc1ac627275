"""What the steps of each objective have done since step 0, and its shares of it. Rank 0 only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bico_ds.planner.flops import useful_flops
from bico_ds.planner.plan import Plan
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, FirstRankCallback, RunStart, StepReport

WORK, SHARE = "work", "share"
# Of what an objective's shares are shown.
SHARED = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs"}


@dataclass(kw_only=True)
class _Done:
    """By one objective: steps, those with an update, rows through the model, the texts' tokens, and seconds of the steps.

    `targets` and `pairs` are what FLOPs are counted from, with the rows.
    """

    steps: int = 0
    updates: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    pairs: int = 0
    seconds: float = 0.0

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.updates += report.applied
        self.rows += report.kept_tokens
        self.tokens += report.represented_tokens
        self.targets += report.targets
        self.pairs += report.pairs or 0
        self.seconds += report.seconds


class ObjectiveWork(FirstRankCallback):
    """Adds up the work of each objective, over all starts of a run; at the end a line, and run.json's `work`.

    FLOPs are the useful ones that MFU counts, of all ranks. `plan`: None where there is none; then there are no FLOPs.
    `tell` shows the line. Of a run whose checkpoint does not know what was done before it, nothing is told.
    """

    def __init__(self, plan: Plan | None, folder: RunFolder, tell: Callback) -> None:
        self._plan, self._folder, self._tell = plan, folder, tell
        self._done: dict[str, _Done] | None = None

    def on_start(self, start: RunStart) -> None:
        saved = start.saved.get("work")
        if saved is not None:
            self._done = {name: _Done(**done) for name, done in saved.items()}
        elif start.first_step == 0:
            self._done = {}

    def on_step(self, report: StepReport) -> None:
        if self._done is not None:
            self._done.setdefault(report.objective, _Done()).add(report)

    def on_end(self, step: int, state: str) -> None:
        if not self._done:
            return
        by_objective = self._by_objective()
        self._tell.on_note(f"work: {'; '.join(self._lines(by_objective))}")
        try:
            self._folder.add_to_start(work=by_objective)
        except OSError as error:  # a run goes on without it
            self._tell.on_message(f"run.json: the work is not in it: {error.strerror}")

    def state(self) -> dict[str, Any]:
        if self._done is None:
            return {}
        return {"work": {name: asdict(done) for name, done in self._done.items()}}

    def numbers(self) -> dict[str, float]:
        """Return the work since step 0 as `work/WHAT/OBJECTIVE`, and shares of it as `share/WHAT/OBJECTIVE`."""
        if not self._done:
            return {}
        by_objective = self._by_objective()
        numbers = {
            f"{WORK}/{what}/{name}": amount
            for name, work in by_objective.items()
            for what, amount in work.items()
        }
        shares = self._shares(by_objective)
        return numbers | {
            f"{SHARE}/{what}/{name}": share for name, parts in shares.items() for what, share in parts.items()
        }

    def _by_objective(self) -> dict[str, dict[str, float]]:
        return {name: self._amounts(done) for name, done in sorted((self._done or {}).items())}

    def _amounts(self, done: _Done) -> dict[str, float]:
        amounts: dict[str, float] = {
            key: getattr(done, key) for key in ("steps", "updates", "rows", "tokens", "seconds")
        }
        if self._plan is not None:
            architecture, model = self._plan.architecture, self._plan.recipe.model
            amounts["flops"] = useful_flops(
                architecture, model, rows=done.rows, targets=done.targets, pairs=done.pairs
            )
        return amounts

    def _shares(self, by_objective: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Of steps, tokens and FLOPs; of none that nobody has."""
        totals = {what: sum(work.get(what, 0) for work in by_objective.values()) for what in SHARED}
        return {
            name: {what: work[what] / total for what, total in totals.items() if total}
            for name, work in by_objective.items()
        }

    def _lines(self, by_objective: dict[str, dict[str, float]]) -> list[str]:
        shares = self._shares(by_objective)
        return [
            f"{name} {work['updates']:,.0f} updates, {work['rows']:,.0f} rows, {work['tokens']:,.0f} tokens"
            + (f", {work['flops']:.3g} FLOPs" if "flops" in work else "")
            + f" ({', '.join(f'{share:.1%} of the {SHARED[what]}' for what, share in shares[name].items())})"
            for name, work in by_objective.items()
        ]
