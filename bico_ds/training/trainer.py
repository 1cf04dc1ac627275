"""The training loop: one global batch per optimizer step, checkpoints and evaluations between the steps.

The loss is scaled in `Trainer._forward_backward`: a micro-batch gives the weighted sum of its targets' losses, and that sum
times (ranks / sum of the weights of the whole global batch) goes to `backward`. DeepSpeed averages gradients over the ranks,
so the update follows the weighted mean over all targets, however they are spread over ranks and micro-batches. Where an
objective gives no weights, they are 1, and their sum is the number of targets. The divergence of `retention` is a
mean over the compared rows in the same way.

The host waits for the device once per step, between the last backward pass and the update (`Trainer._totals`): what the
step gave, what all ranks must know of the next one (its targets, their weight, whether to stop before it), and the gradient
norm of the one before are one vector. So a step is reported when the next one is made. Before a pause (a checkpoint, an
evaluation, the end) the norm is read at once, and nothing is known of the step after it: that step agrees by itself, as
the first one does. DeepSpeed's own waits: docs/benchmarks/step.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bico_ds.batch import PackedBatch
from bico_ds.checkpoint.best import BestCheckpoint
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.common.errors import RunError
from bico_ds.data.loading.loader import RankStep
from bico_ds.data.loading.sample_order import Consumed
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.head import Losses
from bico_ds.named_parts import step_part
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.runtime import host_memory
from bico_ds.runtime.distributed import broadcast_object
from bico_ds.runtime.nodes.own_time import OwnTime
from bico_ds.runtime.peak_memory import PeakMemory
from bico_ds.runtime.run_folder import State
from bico_ds.runtime.watchdog import Watchdog
from bico_ds.training import nonfinite
from bico_ds.training.callbacks.base import Callbacks, StepReport
from bico_ds.training.evaluator import Evaluator, scalars
from bico_ds.training.micro_batches import name_worst
from bico_ds.training.profile.profiler import StepProfiler
from bico_ds.training.run import Run
from bico_ds.training.spikes import SpikeDetector
from bico_ds.training.step_totals import AgreedStep, StepCounts, StepTotals, add_up, agree
from bico_ds.training.targetless import TargetlessSteps


class SpikeError(RunError):
    """A loss or gradient norm is far above its running median, and `training.on_spike` is `stop`."""


class RetentionError(RunError):
    """A retention text's perplexity is above its `stop_if_above`; the step is saved."""


@dataclass(frozen=True, kw_only=True)
class _TakenStep:
    """A step that is not yet reported, because its `norm` (a scalar) is on the device; `losses`: of its `batches`, sums."""

    report: StepReport
    norm: torch.Tensor
    batches: Sequence[PackedBatch]
    losses: list[torch.Tensor]


class Loader(Protocol):
    """What the loop needs of `bico_ds.data.loading.loader`."""

    start_consumed: Consumed

    @property
    def wait_seconds(self) -> float: ...

    def step(self, step: int) -> RankStep: ...

    def state_dict(self, next_step: int, consumed: Consumed) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Trainer:
    """Trains one engine from `step` to `total_steps`; the same calls on every rank."""

    def __init__(
        self,
        *,
        run: Run,
        engine: Engine,
        loader: Loader,
        callbacks: Callbacks,
        checkpointer: Checkpointer,
        evaluator: Evaluator,
        spikes: SpikeDetector,
        watchdog: Watchdog,
        memory: PeakMemory,
        total_steps: int,
        step: int = 0,
        targetless: TargetlessSteps | None = None,
        own_time: OwnTime | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.run, self.engine, self.loader, self.watchdog = run, engine, loader, watchdog
        self.callbacks, self.checkpointer, self.evaluator = callbacks, checkpointer, evaluator
        self.spikes, self.memory = spikes, memory
        self.step, self.total_steps = step, total_steps
        self.targetless = targetless or TargetlessSteps()
        self.own_time = own_time  # None of a single rank
        self.profiler = profiler
        self.consumed = loader.start_consumed
        self._saved_step = step  # at step 0 there is nothing to save
        self._cut_evaluation = False
        self._unreported: _TakenStep | None = None

    def train(self) -> State:
        """Train until the last step or until a stop is agreed, and save a checkpoint of that step (of step 0: none).

        Raises `NonFiniteError`, `SpikeError`, `RetentionError`, `NoTargetsError` and `CheckpointError`, on all ranks alike.
        """
        try:
            self._take_steps()
        except RunError:
            # On all ranks alike, so that the step before can still be reported.
            self._report()
            raise
        finally:
            self.callbacks.on_pause()
            if self.profiler is not None:
                self.profiler.close()
        if self._saved_step != self.step:
            self._save(required=True)
        self.targetless.require_some(self.step, self.total_steps)
        return "done" if self.step == self.total_steps and not self._cut_evaluation else "preempted"

    def _take_steps(self) -> None:
        if (message := self.checkpointer.best.begin()) is not None:
            self.callbacks.on_message(message)
        if self._evaluation_is_missing():
            self._evaluate()
        elif self.step and not self.checkpointer.best.is_remeasured:
            self._keep_if_best(self.evaluator.kept_numbers(self.step))
        agreed: AgreedStep | None = None
        self._last_moment = time.perf_counter()
        while self.step < self.total_steps:
            self.watchdog.note_progress()
            self._begin_step()
            waited = self.loader.wait_seconds
            agreed = agreed or self._agree()
            if agreed.stop:
                break
            agreed = self._take_step(agreed, waited)
            self.step += 1
            self.memory.note()
            if self.run.ranks.device.type == "cpu":
                host_memory.release_freed_pages()
            if self.run.recipe.training.on_spike == "stop":
                # A step whose norm has jumped must be the last one, and must not be saved.
                self._report()
            if agreed is None:
                self._pause()
                self._last_moment = time.perf_counter()
        self._report()

    def _agree(self) -> AgreedStep:
        """Make the step after a pause known."""
        agreed = agree(self._rank_step(self.step), self.run)
        if self.own_time is not None:
            self.own_time.begin()
        return agreed

    def _is_logged(self, step: int) -> bool:
        """Whether a line of metrics ends with this step; the same on all ranks."""
        return step == self.total_steps or step % self.run.recipe.monitor.every_steps == 0

    def _rank_step(self, step: int) -> RankStep:
        with step_part(StepPart.DATA.value):
            return self.loader.step(step)

    def _pauses_after(self, step: int) -> bool:
        """Whether training pauses after so many steps, or ends; the same on all ranks."""
        return (
            step == self.total_steps
            or self.checkpointer.is_due(step)
            or self.evaluator.is_due(step, self.total_steps)
        )

    def _pause(self) -> None:
        """What is due between two steps."""
        self._report()
        self.callbacks.on_pause()  # before the checkpoint: a run that goes on from it writes later steps alone
        last = self.step == self.total_steps
        if last or self.checkpointer.is_due(self.step):
            # Before the evaluation, which may take long: a crash in it must not cost steps.
            self._save(required=last)
        if self.evaluator.is_due(self.step, self.total_steps):
            self._evaluate()

    def _evaluation_is_missing(self) -> bool:
        """Whether that before the first step is due, or a stop or a crash cut off that of the step resumed from."""
        if not self.evaluator.is_due(self.step, self.total_steps):
            return False
        return self.step == 0 or broadcast_object(
            self.run.ranks.is_first and not self.evaluator.has_result(self.step)
        )

    def _take_step(self, agreed: AgreedStep, waited: float) -> AgreedStep | None:
        """Forward, backward and update of one global batch, and the report of the step before; returns the next step.

        The loss is the weighted mean over all targets. Without any target there is no forward and no update, but the
        schedule counts the step. Of a step before a pause the next one is not known: None.
        """
        rank_step, counts = agreed.rank_step, agreed.counts
        found = self._forward_backward(rank_step.batches, counts) if counts.targets else []
        totals = self._totals(rank_step.batches, found, waited)
        report = self._report_of(agreed, totals)
        losses = [part.loss for part in found]
        if self.run.recipe.training.on_spike == "stop":
            # The gradient norm is known after the update only.
            self._look_for_spike(report, rank_step.batches, losses)
        both = [part.loss + part.divergence for part in found]
        applied = self._update(rank_step.batches, both, math.isfinite(totals.loss + totals.divergence))
        norm = self.engine.get_global_grad_norm() if applied else math.nan
        # DeepSpeed's is a scalar tensor, on the device or (with offload) the host; None where it computes none.
        norm = norm if isinstance(norm, torch.Tensor) else torch.tensor(norm or 0.0)
        self.consumed = self.consumed.plus(rank_step.counts)
        report = replace(self._end_step(report), applied=applied, sources=self.consumed.by_source())
        # After the update has begun, so that what shows and writes a step does not hold it up.
        self._report(totals.norm_before)
        self._unreported = _TakenStep(report=report, norm=norm, batches=rank_step.batches, losses=losses)
        return totals.following

    def _begin_step(self) -> None:
        if self.profiler is not None and self.profiler.begin(self.step + 1):
            self._last_moment = time.perf_counter()  # to begin to record is none of a step's work

    def _end_step(self, report: StepReport) -> StepReport:
        """With its seconds since the end of the step before, or the pause after it: no moment of training is left out."""
        if self.profiler is not None:
            self.profiler.settle()
        before, self._last_moment = self._last_moment, time.perf_counter()
        seconds = self._last_moment - before
        is_recorded = self.profiler is not None and self.profiler.end(report.step, report.objective, seconds)
        if is_recorded:
            # Writing what was recorded is none of a step's work.
            self._last_moment = time.perf_counter()
            if self.own_time is not None:
                self.own_time.begin()
        return replace(report, seconds=seconds, is_recorded=is_recorded)

    def _report_of(self, agreed: AgreedStep, totals: StepTotals) -> StepReport:
        """What is known of a step before its update."""
        counts, size = agreed.counts, self.run.ranks.world_size
        return StepReport(
            step=self.step + 1,
            objective=agreed.rank_step.objective,
            loss=totals.loss / counts.weight if counts.targets else math.nan,
            targets=counts.targets,
            weight=counts.weight,
            grad_norm=math.nan,
            learning_rate=self.engine.get_lr()[0],
            kept_tokens=totals.rows,
            represented_tokens=totals.represented,
            fill=agreed.rank_step.fill,
            seconds=math.nan,
            wait_seconds=totals.wait_seconds / size,
            pairs=totals.pairs,
            divergence=totals.divergence / counts.compared if counts.targets and counts.compared else None,
            source_losses=self._source_losses(totals),
            own_seconds=list(totals.own_seconds),
            memory=totals.memory,
        )

    def _report(self, norm: float | None = None) -> None:
        """Report the last step, unless that is done; `norm` is its gradient's, and without it the host waits for it."""
        if (taken := self._unreported) is None:
            return
        self._unreported = None
        report = replace(taken.report, grad_norm=float(taken.norm) if norm is None else norm)
        if report.applied:
            is_spike = self._look_for_spike(report, taken.batches, taken.losses, report.grad_norm)
            report = replace(report, is_spike=is_spike)
        elif report.targets:
            self.callbacks.on_message(f"step {report.step}: loss or gradient not finite, update skipped")
        self.callbacks.on_batches(report.step, report.objective, taken.batches)
        self.callbacks.on_step(report)
        if (message := self.targetless.count(report)) is not None:
            self.callbacks.on_message(message)

    def _source_losses(self, totals: StepTotals) -> dict[str, list[float]]:
        """By data source the weighted mean loss and the sum of the weights; of none without targets."""
        triples = zip(self.consumed.sources, totals.source_losses, totals.source_weights, strict=False)
        return {name: [total / weight, weight] for name, total, weight in triples if weight}

    def _forward_backward(self, batches: Sequence[PackedBatch], counts: StepCounts) -> list[Losses]:
        """Add up the gradients of this rank's micro-batches; return their sums of losses, in nats and not scaled."""
        ranks, retention = self.run.ranks, self.run.recipe.retention
        # Dropout: the same after a resume, at the same number of ranks.
        torch.manual_seed((self.run.recipe.seed * 1_000_003 + self.step * 4099 + ranks.rank) % 2**64)
        scale = ranks.world_size / counts.weight  # DeepSpeed averages the gradients over the ranks
        found = []
        for number, batch in enumerate(batches, start=1):
            with step_part(StepPart.DATA.value):
                batch = batch.to(ranks.device, non_blocking=True)
            losses = self.engine(batch)
            total = losses.loss * scale
            if retention is not None:
                # Where nothing is compared, too: all that the head gives takes part in the backward pass.
                total = total + losses.divergence * (
                    retention.kl * ranks.world_size / max(counts.compared, 1)
                )
            self.engine.backward(total, scale_wrt_gas=False)
            found.append(Losses(*(part.detach() for part in losses)))
            if number < len(batches):
                self.engine.step()
        return found

    def _totals(self, batches: Sequence[PackedBatch], found: Sequence[Losses], waited: float) -> StepTotals:
        """What the step gave, with the next step unless a pause comes before it: here a step waits for the device.

        `found`: of each batch, none of a step without targets; `waited`: what the loader had waited when the step began.
        """
        # While the device works; the batches are built by then, as a rule.
        following = None if self._pauses_after(self.step + 1) else self._rank_step(self.step + 1)
        totals = add_up(
            batches if found else [],
            found,
            self.run,
            sources=len(self.consumed.sources),
            wait_seconds=self.loader.wait_seconds - waited,
            norm_before=None if self._unreported is None else self._unreported.norm,
            following=following,
            own_seconds=None if self.own_time is None else self.own_time.end(),
            memory=self.memory.now() if self._is_logged(self.step + 1) else None,
        )
        if self.own_time is not None:
            self.own_time.begin()
        return totals

    def _update(
        self, batches: Sequence[PackedBatch], losses: list[torch.Tensor], loss_is_finite: bool
    ) -> bool:
        """The optimizer step; returns whether it changed the weights. Where a gradient is not finite, DeepSpeed skips it.

        `losses`: of each batch, with its divergence; none of a step without targets, which changes nothing.
        """
        must_stop = self.run.recipe.training.on_nonfinite == "stop"
        if not loss_is_finite and must_stop:
            nonfinite.stop(self.step, batches, losses, self.run)
        if not losses:
            # No step of the engine: without a gradient it would still decay the weights and move Adam's averages.
            self.engine.lr_scheduler.step()
            return False
        with step_part(StepPart.OPTIMIZER.value):
            self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if applied and not loss_is_finite:
            raise nonfinite.NonFiniteError(
                f"step {self.step + 1}: an update was made from a loss that is not finite; resume from the last checkpoint"
            )
        if not applied:
            if must_stop:
                nonfinite.stop(self.step, batches, losses, self.run)
            # DeepSpeed leaves the schedule where it was, but the schedule counts steps, not updates.
            self.engine.lr_scheduler.step()
        return applied

    def _look_for_spike(
        self,
        report: StepReport,
        batches: Sequence[PackedBatch],
        losses: list[torch.Tensor],
        grad_norm: float | None = None,
    ) -> bool:
        """Whether this step's loss or norm is one. With `grad_norm` the update was made. Raises `SpikeError`."""
        choice, step, objective = self.run.recipe.training.on_spike, report.step, report.objective
        spike = self.spikes.find(step, objective, loss=report.loss, grad_norm=grad_norm)
        if choice == "off" or spike is None:
            return False
        if choice == "stop" or self.spikes.is_first(objective):
            where = name_worst(step, batches, losses, self.run)
            if choice == "stop":
                done = (
                    "the weights are unchanged"
                    if grad_norm is None
                    else "the update was made, and is not saved"
                )
                raise SpikeError(
                    f"step {step}: {spike}; {done}. Resume with a lower optimizer.lr, or go on with "
                    f"training.on_spike=warn.\n{where}"
                )
            self.callbacks.on_message(f"WARNING: step {step}: {spike} (training.on_spike); {where}")
        return True

    def _evaluate(self) -> None:
        self.watchdog.note_progress()
        started = time.perf_counter()
        model = self.engine.module
        result = self.evaluator(model.causal_lm, self.step, model)
        # ZeRO-3 fetches ahead for the backward pass that an evaluation does not have, and an export or a checkpoint meets
        # parameters in flight.
        self.engine.empty_partition_cache()
        self._cut_evaluation = result is None
        if result is not None:
            self.callbacks.on_numbers(self.step, "evaluation", scalars(result))
            for message in self.evaluator.messages(result, self.step, self.total_steps):
                self.callbacks.on_message(f"step {self.step}  {message}")
            self.callbacks.on_numbers(
                self.step, "timing", {"speed/evaluation_seconds": time.perf_counter() - started}
            )
            self.callbacks.on_evaluation(self.step, result)
            self._stop_above_limit(result)
            self._keep_if_best(scalars(result))

    def _keep_if_best(self, numbers: Mapping[str, float]) -> None:
        """Keep this step's checkpoint where its evaluation is the best so far; it is saved where there is none yet."""
        keeper = self.checkpointer.best
        best, before = keeper.better(self.step, numbers), keeper.best
        if self.step == 0 or best is None:
            return
        if not keeper.has(self.step) and not self._save(best=best):
            return
        failure = self.checkpointer.keep_best(best)
        of_before = "" if before is None else f"; before: {before}"
        self.callbacks.on_message(f"best checkpoint so far: {best}{of_before}")
        if failure is not None:
            self.callbacks.on_message(f"WARNING: the best checkpoint is kept, but not recorded: {failure}")
        self.callbacks.on_numbers(self.step, "best", {"best/step": best.step, "best/value": best.value})

    def _stop_above_limit(self, result: EvaluationResult) -> None:
        """Save this step and raise `RetentionError` where a text is above its limit."""
        if self.step == 0 or (reason := self.evaluator.above_limit(result)) is None:
            return
        if self._saved_step != self.step:
            self._save(required=True)
        raise RetentionError(
            f"step {self.step}: {reason}. The step is saved; the run goes on from there once the limit is raised or left "
            "out, or from an earlier checkpoint (--resume RUN/checkpoints/step-N) with other settings: docs/retention.md"
        )

    def _save(self, *, required: bool = False, best: BestCheckpoint | None = None) -> bool:
        """Write a checkpoint of this step; `best`: it will be the best one. Returns whether it is there."""
        self.watchdog.note_progress()
        state = {
            "loader": self.loader.state_dict(self.step, self.consumed),
            "callbacks": self.callbacks.state(),
            "targetless": self.targetless.state(),
            "texts_before": self.evaluator.before,
            "best": self.checkpointer.best.state(best),
        }
        saved = self.checkpointer.save(self.engine, self.step, state, required=required)
        if saved.failure is not None:
            self.callbacks.on_message(
                f"step {self.step}: no checkpoint: {saved.failure}; training goes on (checkpoint.on_write_error)"
            )
            return False
        self._saved_step = self.step
        self.callbacks.on_numbers(self.step, "checkpoint", {"speed/checkpoint_seconds": saved.seconds})
        return True
