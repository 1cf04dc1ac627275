"""What the loop reports to its callbacks, and when.

Every rank calls its callbacks at the same points of the loop. Numbers and texts are the same on all ranks, except times
(`StepReport.seconds`; numbers of the kinds `timing` and `checkpoint`), so that a callback may use collectives; one that only
shows or writes is a `FirstRankCallback`. After a failure of any rank the calls end, on some ranks earlier than on others,
and `on_end` is not called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bico_ds.batch import PackedBatch
from bico_ds.config.schema import Recipe
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.training.callbacks.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known when the loop begins; `saved` is what `Callback.state` returned at the checkpoint.

    `banner`: what is to run, as labels and texts (`bico_ds.training.callbacks.banner`).
    """

    recipe: Recipe
    first_step: int
    total_steps: int
    summary: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict)
    banner: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, summed over all ranks.

    `step` counts from 1. `loss` is the weighted mean over the `targets` of the global batch, in nats, and `weight` the sum
    of the weights; None in a checkpoint of before there were weights: they are 1. `grad_norm` is that of the
    whole model before clipping, and `learning_rate` that of this update. `applied` is false where no update was made: the
    step has no target (`targets` is 0: nothing went through the model, `loss` and `grad_norm` are NaN), or it was skipped
    (`training.on_nonfinite: skip`: `grad_norm` is NaN, and `loss` may be). `kept_tokens` counts the rows that went
    through the model (kept tokens and live placeholders), `represented_tokens` the original tokens behind them. `pairs`
    counts the (query, key) pairs that attention sees, per head and layer; None in a checkpoint of before it was counted.
    `seconds` is the wall time on this rank since the step before ended, or the pause before it; so what shows and writes
    steps is in it. `wait_seconds`: the part spent waiting for data (mean over ranks).
    `fill` is the fraction of the bins' capacity that is used, as the objective expands documents. `sources` holds what was
    consumed since step 0, by data source: packed sequences (key `rows`) and their tokens. `is_spike`: the loss or the norm
    is far above its running median (`bico_ds.training.spikes`); false under `training.on_spike: off`. `divergence`: the
    mean KL(start model ‖ model) over the rows that `retention` compares, in nats; None where none was. `source_losses`: by
    data source, where there are several, the weighted mean loss of its targets and the sum of their weights.
    `own_seconds`: by rank, where there are several, what it worked since the ranks were last together and did not wait for
    others; on GPUs of the step before (`bico_ds.runtime.nodes.own_time`). `memory`: of a step that ends a logged
    interval, what the ranks had before its update (`bico_ds.runtime.peak_memory.MemoryUse`): each number is the largest of
    any rank's. `is_recorded`: a profile has recorded the step, which made it slower.
    """

    step: int
    objective: str
    loss: float
    targets: int
    grad_norm: float
    learning_rate: float
    kept_tokens: int
    represented_tokens: int
    fill: float
    seconds: float
    wait_seconds: float
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: int | None = None
    applied: bool = True
    is_spike: bool = False
    divergence: float | None = None
    source_losses: dict[str, list[float]] = field(default_factory=dict)
    weight: float | None = None
    own_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    is_recorded: bool = False


class Callback:
    """Overrides what it needs. Called on every rank."""

    def on_start(self, start: RunStart) -> None: ...

    def on_step(self, report: StepReport) -> None:
        """A step is made; called once for each, in order, as soon as the next one is made or training pauses.

        A run that fails calls it for the steps before the failing one, unless the failure is of one rank alone.
        """

    def on_pause(self) -> None:
        """Training pauses, or ends in whatever way, and its last step was told: nothing should wait to be written.

        It must not use collectives: after a failure it is called, too.
        """

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        """Numbers other than a step's, by `kind`: `evaluation`, `timing` (of an evaluation), `checkpoint`.

        Of the kind `plan` (`bico_ds.training.callbacks.planned`) those of rank 0 that show or write get some, and so they do
        of `timing`: of pictures (`bico_ds.training.callbacks.tensorboard.pages`).
        """

    def on_batches(self, step: int, objective: str, batches: Sequence[PackedBatch]) -> None:
        """What this rank's part of a step was made of, on the CPU; called before the step's `on_step`."""

    def on_evaluation(self, step: int, result: EvaluationResult) -> None:
        """An evaluation with all its answers, after its numbers and its time were told."""

    def on_message(self, text: str) -> None:
        """A line for the user to read; may come before `on_start`."""

    def on_note(self, text: str) -> None:
        """A message that a quiet console leaves out."""
        self.on_message(text)

    def on_end(self, step: int, state: str) -> None:
        """The run is `done`, with its export written, or `preempted`; a run that fails ends without this call."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values, under keys that no other callback uses.

        Rank 0's is saved, and every rank gets it back (`RunStart.saved`).
        """
        return {}


class FirstRankCallback(Callback):
    """A callback of rank 0 alone. It must not use collectives: the other ranks do not take part."""


class Callbacks(Callback):
    """All callbacks of this rank as one."""

    def __init__(
        self, callbacks: Sequence[Callback], *, is_first_rank: bool, watch: Stopwatch | None = None
    ) -> None:
        """`callbacks`: the same on every rank, in the same order; `is_first_rank`: whether this is rank 0.

        `watch` runs while steps and messages are shown and written.
        """
        self._callbacks = [c for c in callbacks if is_first_rank or not isinstance(c, FirstRankCallback)]
        self._watch = watch or Stopwatch()

    def on_start(self, start: RunStart) -> None:
        for callback in self._callbacks:
            callback.on_start(start)

    def on_step(self, report: StepReport) -> None:
        with self._watch:
            for callback in self._callbacks:
                callback.on_step(report)

    def on_pause(self) -> None:
        with self._watch:
            for callback in self._callbacks:
                callback.on_pause()

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_numbers(step, kind, numbers)

    def on_batches(self, step: int, objective: str, batches: Sequence[PackedBatch]) -> None:
        for callback in self._callbacks:
            callback.on_batches(step, objective, batches)

    def on_evaluation(self, step: int, result: EvaluationResult) -> None:
        for callback in self._callbacks:
            callback.on_evaluation(step, result)

    def on_message(self, text: str) -> None:
        with self._watch:
            for callback in self._callbacks:
                callback.on_message(text)

    def on_note(self, text: str) -> None:
        with self._watch:
            for callback in self._callbacks:
                callback.on_note(text)

    def on_end(self, step: int, state: str) -> None:
        for callback in self._callbacks:
            callback.on_end(step, state)

    def state(self) -> dict[str, Any]:
        return {key: value for callback in self._callbacks for key, value in callback.state().items()}
