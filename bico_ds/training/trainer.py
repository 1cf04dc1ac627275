"""The training loop: one global batch per optimizer step, checkpoints and evaluations between the steps.

The loss is scaled in `Trainer._forward_backward`: a micro-batch gives the sum of its targets' losses, and that sum times
(ranks / targets of the whole global batch) goes to `backward`. DeepSpeed averages gradients over the ranks, so the update
follows the mean over all targets, however they are spread over ranks and micro-batches. The divergence of `retention` is a
mean over the compared rows in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bico_ds.batch import PackedBatch
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.common.errors import RunError
from bico_ds.data.loading.loader import RankStep
from bico_ds.data.loading.sample_order import Consumed
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.head import Losses
from bico_ds.runtime import host_memory
from bico_ds.runtime.distributed import all_reduce_sum, broadcast_object
from bico_ds.runtime.run_folder import State
from bico_ds.runtime.watchdog import Watchdog
from bico_ds.training import nonfinite
from bico_ds.training.callbacks.base import Callbacks, StepReport
from bico_ds.training.evaluator import Evaluator, scalars
from bico_ds.training.micro_batches import name_worst
from bico_ds.training.run import Run
from bico_ds.training.spikes import SpikeDetector
from bico_ds.training.targetless import TargetlessSteps


class SpikeError(RunError):
    """A loss or gradient norm is far above its running median, and `training.on_spike` is `stop`."""


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Of the whole global batch: its targets, and the rows that are compared with the start model."""

    targets: int
    compared: int


class RetentionError(RunError):
    """A retention text's perplexity is above its `stop_if_above`; the step is saved."""


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
        total_steps: int,
        step: int = 0,
        targetless: TargetlessSteps | None = None,
    ) -> None:
        self.run, self.engine, self.loader, self.watchdog = run, engine, loader, watchdog
        self.callbacks, self.checkpointer, self.evaluator = callbacks, checkpointer, evaluator
        self.spikes = spikes
        self.step, self.total_steps = step, total_steps
        self.targetless = targetless or TargetlessSteps()
        self.consumed = loader.start_consumed
        self._saved_step = step  # at step 0 there is nothing to save
        self._cut_evaluation = False

    def train(self) -> State:
        """Train until the last step or until a stop is agreed, and save a checkpoint of that step (of step 0: none).

        Raises `NonFiniteError`, `SpikeError`, `RetentionError`, `NoTargetsError` and `CheckpointError`, on all ranks alike.
        """
        if self._evaluation_is_missing():
            self._evaluate()
        while self.step < self.total_steps:
            self.watchdog.note_progress()
            started, waited = time.perf_counter(), self.loader.wait_seconds
            rank_step = self.loader.step(self.step)
            counts, stop = self._agree(rank_step.batches)
            if stop:
                break
            take_step = self._optimize if counts.targets else self._pass_over
            report = take_step(rank_step, counts, started, waited)
            self.step += 1
            if self.run.ranks.device.type == "cpu":
                host_memory.release_freed_pages()
            self.callbacks.on_step(report)
            if (message := self.targetless.count(report)) is not None:
                self.callbacks.on_message(message)
            last = self.step == self.total_steps
            if last or self.checkpointer.is_due(self.step):
                # Before the evaluation, which may take long: a crash in it must not cost steps.
                self._save(required=last)
            if self.evaluator.is_due(self.step, self.total_steps):
                self._evaluate()
        if self._saved_step != self.step:
            self._save(required=True)
        self.targetless.require_some(self.step, self.total_steps)
        return "done" if self.step == self.total_steps and not self._cut_evaluation else "preempted"

    def _evaluation_is_missing(self) -> bool:
        """Whether that before the first step is due, or a stop or a crash cut off that of the step resumed from."""
        if not self.evaluator.is_due(self.step, self.total_steps):
            return False
        return self.step == 0 or broadcast_object(not self.evaluator.has_result(self.step))

    def _agree(self, batches: Sequence[PackedBatch]) -> tuple[StepCounts, bool]:
        """The counts of the whole step, and whether any rank was asked to stop: one all-reduce before the first backward."""
        targets = sum(len(batch.targets) for batch in batches)
        compared = sum(len(batch.compared.index) for batch in batches if batch.compared is not None)
        targets, compared, stops = map(
            int, all_reduce_sum([targets, compared, float(bool(self.run.stop))], self.run.ranks.device)
        )
        return StepCounts(targets=targets, compared=compared), stops > 0

    def _optimize(self, rank_step: RankStep, counts: StepCounts, started: float, waited: float) -> StepReport:
        """Forward, backward and update of one global batch; the loss is the mean over all its targets."""
        ranks, batches, targets = self.run.ranks, rank_step.batches, counts.targets
        found = self._forward_backward(batches, counts)
        losses = [part.loss for part in found]
        totals = self._totals(batches, found, self.loader.wait_seconds - waited)
        loss = totals[0] / targets
        learning_rate = self.engine.get_lr()[0]
        if self.run.recipe.training.on_spike == "stop":
            # The gradient norm is known after the update only.
            self._look_for_spike(rank_step, losses, loss)
        both = [part.loss + part.divergence for part in found]
        applied = self._update(batches, both, math.isfinite(totals[0] + totals[5]))
        norm = self.engine.get_global_grad_norm() if applied else math.nan
        # Not `norm or 0.0`: of a tensor on a GPU that would wait for it a second time.
        grad_norm = 0.0 if norm is None else float(norm)
        self.consumed = self.consumed.plus(rank_step.counts)
        return StepReport(
            step=self.step + 1,
            objective=rank_step.objective,
            loss=loss,
            targets=targets,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            kept_tokens=int(totals[1]),
            represented_tokens=int(totals[2]),
            fill=rank_step.fill,
            seconds=time.perf_counter() - started,
            wait_seconds=totals[3] / ranks.world_size,
            sources=self.consumed.by_source(),
            pairs=int(totals[4]),
            applied=applied,
            is_spike=applied and self._look_for_spike(rank_step, losses, loss, grad_norm),
            divergence=totals[5] / counts.compared if counts.compared else None,
            source_losses=self._source_losses(totals[6:]),
        )

    def _source_losses(self, totals: list[float]) -> dict[str, list[float]]:
        """By data source the mean loss and the targets, from the sums and counts of `_totals`; of none without targets."""
        names = list(self.consumed.sources)
        pairs = zip(names, totals[: len(names)], totals[len(names) :], strict=False)
        return {name: [total / count, count] for name, total, count in pairs if count}

    def _pass_over(
        self, rank_step: RankStep, counts: StepCounts, started: float, waited: float
    ) -> StepReport:
        """A step without any target, on all ranks alike: no forward and no update, but the schedule counts it."""
        ranks, learning_rate = self.run.ranks, self.engine.get_lr()[0]
        # No step of the engine: without a gradient it would still decay the weights and move Adam's averages.
        self.engine.lr_scheduler.step()
        self.consumed = self.consumed.plus(rank_step.counts)
        (wait_seconds,) = all_reduce_sum([self.loader.wait_seconds - waited], ranks.device)
        return StepReport(
            step=self.step + 1,
            objective=rank_step.objective,
            loss=math.nan,
            targets=counts.targets,
            grad_norm=math.nan,
            learning_rate=learning_rate,
            kept_tokens=0,
            represented_tokens=0,
            fill=rank_step.fill,
            seconds=time.perf_counter() - started,
            wait_seconds=wait_seconds / ranks.world_size,
            sources=self.consumed.by_source(),
            pairs=0,
            applied=False,
        )

    def _forward_backward(self, batches: Sequence[PackedBatch], counts: StepCounts) -> list[Losses]:
        """Add up the gradients of this rank's micro-batches; return their sums of losses, in nats and not scaled."""
        ranks, retention = self.run.ranks, self.run.recipe.retention
        # Dropout: the same after a resume, at the same number of ranks.
        torch.manual_seed((self.run.recipe.seed * 1_000_003 + self.step * 4099 + ranks.rank) % 2**64)
        scale = ranks.world_size / counts.targets  # DeepSpeed averages the gradients over the ranks
        found = []
        for number, batch in enumerate(batches, start=1):
            losses = self.engine(batch.to(ranks.device, non_blocking=True))
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

    def _totals(self, batches: Sequence[PackedBatch], found: Sequence[Losses], waited: float) -> list[float]:
        """Over all ranks: loss, rows, tokens, seconds of waiting, pairs, divergence; by source the losses, the targets.

        What is on the device is read at once: each reading waits for it.
        """
        rows = sum(len(batch.input_ids) for batch in batches)
        represented = sum(batch.represented_tokens for batch in batches)
        pairs = sum(batch.plan.num_pairs for batch in batches)
        sums = torch.stack([torch.stack((part.loss, part.divergence)) for part in found]).double().sum(0)
        targets: list[int] = []
        if (size := len(self.consumed.sources)) > 1:
            sources = torch.cat([b.target_sources for b in batches if b.target_sources is not None])
            row_losses = torch.cat([part.row_losses for part in found]).double()
            by_source = sums.new_zeros(size).index_add_(0, sources.to(sums.device), row_losses)
            sums, targets = torch.cat([sums, by_source]), torch.bincount(sources, minlength=size).tolist()
        loss, divergence, *losses = sums.tolist()
        own = [loss, rows, represented, waited, pairs, divergence, *losses, *targets]
        return all_reduce_sum(own, self.run.ranks.device)

    def _update(
        self, batches: Sequence[PackedBatch], losses: list[torch.Tensor], loss_is_finite: bool
    ) -> bool:
        """The optimizer step; returns whether it changed the weights. Where a gradient is not finite, DeepSpeed skips it."""
        must_stop = self.run.recipe.training.on_nonfinite == "stop"
        if not loss_is_finite and must_stop:
            nonfinite.stop(self.step, batches, losses, self.run)
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
            self.callbacks.on_message(f"step {self.step + 1}: loss or gradient not finite, update skipped")
        return applied

    def _look_for_spike(
        self, rank_step: RankStep, losses: list[torch.Tensor], loss: float, grad_norm: float | None = None
    ) -> bool:
        """Whether this step's loss or norm is one. With `grad_norm` the update was made. Raises `SpikeError`."""
        choice, step, objective = self.run.recipe.training.on_spike, self.step + 1, rank_step.objective
        spike = self.spikes.find(step, objective, loss=loss, grad_norm=grad_norm)
        if choice == "off" or spike is None:
            return False
        if choice == "stop" or self.spikes.is_first(objective):
            where = name_worst(step, rank_step.batches, losses, self.run)
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
        result = self.evaluator(self.engine.module.causal_lm, self.step)
        self._cut_evaluation = result is None
        if result is not None:
            self.callbacks.on_numbers(self.step, "evaluation", scalars(result))
            for message in self.evaluator.messages(result, self.step, self.total_steps):
                self.callbacks.on_message(f"step {self.step}  {message}")
            self.callbacks.on_numbers(
                self.step, "timing", {"speed/evaluation_seconds": time.perf_counter() - started}
            )
            self._stop_above_limit(result)

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

    def _save(self, *, required: bool = False) -> None:
        self.watchdog.note_progress()
        state = {
            "loader": self.loader.state_dict(self.step, self.consumed),
            "callbacks": self.callbacks.state(),
            "targetless": self.targetless.state(),
            "texts_before": self.evaluator.before,
        }
        saved = self.checkpointer.save(self.engine, self.step, state, required=required)
        if saved.failure is not None:
            self.callbacks.on_message(
                f"step {self.step}: no checkpoint: {saved.failure}; training goes on (checkpoint.on_write_error)"
            )
            return
        self._saved_step = self.step
        self.callbacks.on_numbers(self.step, "checkpoint", {"speed/checkpoint_seconds": saved.seconds})
