"""The reversal tasks and retention texts during training: the ranks share out prompts and windows.

It is no callback, because the loop must know whether an evaluation was cut off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from bico_ds.attention.layout import LayoutPolicy
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.sections.evaluation import EvaluationSpec
from bico_ds.evaluation.contamination import TrainingTexts, apart, find_orders
from bico_ds.evaluation.held_out import loss as held_out_loss
from bico_ds.evaluation.metric_identity import metric_identity
from bico_ds.evaluation.replica import full_replica
from bico_ds.evaluation.report.runs import headline_keys
from bico_ds.evaluation.report.tables import answered_line, contamination_line, search_notes
from bico_ds.evaluation.results import EvaluationResult, Order, load_result
from bico_ds.evaluation.retention_texts import above_limit, measure, reference
from bico_ds.evaluation.run_tasks import evaluate, options_in_training
from bico_ds.evaluation.scoring.choice import choice_test
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.model.build import TrainableModel
from bico_ds.model.weights.materialize import full_numel, is_partitioned
from bico_ds.planner.run_time import REPLICA_PARAMETERS
from bico_ds.runtime.distributed import Ranks, broadcast_object
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.assembly import RunInputs

# Training waits while its texts are searched for the questions: a minute or two for so many tokens per rank.
SEARCHED_TOKENS = 100_000_000
# A window has logits of every token, and stands beside the training state.
_WINDOWS_PER_BATCH = 1


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates the model in training, and writes the result of every prompt into the run folder.

    `inputs`: the tasks, their tokenizer, and whether prompts begin with BOS. `on_progress`: called after each of this
    rank's batches. `before`: the texts' results before training, once they are known; a checkpoint keeps them.
    `layout_policy`: of the attention backend, for held-out losses.
    """

    spec: EvaluationSpec
    inputs: RunInputs
    ranks: Ranks
    folder: RunFolder
    stop: StopFlag
    on_progress: Callable[[], None]
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout_policy: LayoutPolicy | None = None
    _orders: dict[str, list[Order]] = field(default_factory=dict, init=False)
    _unwritten: dict[int, tuple[str, str]] = field(
        default_factory=dict, init=False
    )  # by step: content, and why

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the model is evaluated after so many steps; before the first one, on texts and held-out stores alone."""
        of_texts = bool(self.inputs.texts or self.inputs.held_out)
        if step == 0:
            return of_texts
        every = self.spec.every_steps
        asked = bool(self.inputs.tasks) or of_texts
        return asked and (step == total_steps or (every is not None and step % every == 0))

    def __call__(
        self, causal_lm: PreTrainedModel, step: int, trained: TrainableModel | None = None
    ) -> EvaluationResult | None:
        """Run all tasks, and write evaluation/step-N.json on rank 0; of step 0 no task is asked. Collective.

        `trained`: the same model as it is trained, by which held-out losses are measured.
        A file that cannot be written is no error: `messages` says so, and the next evaluation tries again.
        Returns the same result on every rank, or None on all of them where any was asked to stop meanwhile. Raises
        `UserError` for a prompt that does not fit the model's context.
        """
        partitioned = any(map(is_partitioned, causal_lm.parameters()))
        replicate = partitioned and sum(map(full_numel, causal_lm.parameters())) <= REPLICA_PARAMETERS
        was_training = causal_lm.training
        model = full_replica(causal_lm, device=self.ranks.device) if replicate else causal_lm.eval()
        with torch.no_grad():
            result = self._evaluate(model, step, synced=partitioned and not replicate)
        del model  # a replica's memory
        causal_lm.train(was_training)
        if result is not None and trained is not None and self.inputs.held_out:
            result = self._with_held_out(result, trained, synced=partitioned)
        if result is not None and self.ranks.is_first:
            self._unwritten[step] = (json.dumps(result.to_json(), ensure_ascii=False, indent=1), "")
            self._write()
        return result

    def _write(self) -> None:
        """The result files that are not written yet."""
        for step, (content, _) in list(self._unwritten.items()):
            path = self.folder.evaluation_file(step)
            try:
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, content)
            except OSError as error:
                self._unwritten[step] = (content, error.strerror or str(error))
            else:
                del self._unwritten[step]

    def _evaluate(self, model: PreTrainedModel, step: int, *, synced: bool) -> EvaluationResult | None:
        """Perplexities of texts, and after step 0 what the tasks give."""
        share = self._share(synced=synced)
        texts = self._measure_texts(model, step, replace(share, batch_size=_WINDOWS_PER_BATCH))
        if texts is None:
            return None
        result = EvaluationResult(tasks={}) if step == 0 else self._ask(model, share)
        return None if result is None else replace(result, texts=texts)

    def _share(self, *, synced: bool) -> PromptShare:
        return PromptShare(
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            synced=synced,
            device=self.ranks.device,
            batch_size=self.spec.batch_size,
            should_stop=lambda: bool(self.stop),
            on_batch=lambda sequences: self.on_progress(),
        )

    def _with_held_out(
        self, result: EvaluationResult, model: TrainableModel, *, synced: bool
    ) -> EvaluationResult | None:
        """The result with the losses of held-out stores, by the model itself: a replica has other attention."""
        losses = held_out_loss.measure(
            model, self.inputs.held_out, self._share(synced=synced), self.layout_policy
        )
        return None if losses is None else replace(result, held_out=losses)

    def _measure_texts(
        self, model: PreTrainedModel, step: int, share: PromptShare
    ) -> dict[str, dict[str, Any]] | None:
        texts = self.inputs.texts
        found = measure(model, texts, self.before, share)
        if step > 0 or found is None:
            return found
        self.before.update(found)
        return {name: {**values, "times": 1.0} for name, values in found.items()}

    def _ask(self, model: PreTrainedModel, share: PromptShare) -> EvaluationResult | None:
        """Generated answers, and where the recipe asks for it the log-probability test."""
        tasks, tokenizer, add_bos = self.inputs.tasks, self.inputs.tokenizer, self.inputs.add_bos
        if not tasks:
            return EvaluationResult(tasks={})
        result = evaluate(model, tokenizer, tasks, options_in_training(self.spec, add_bos=add_bos), share)
        if result is not None and self.searches_training_texts:
            result = self._apart(result, share)
        others = self.spec.likelihood_others
        if result is None or others is None:
            return result
        choice: dict[str, dict[str, Any]] = {}
        for task in tasks:
            test = choice_test(model, tokenizer, task, others=others, add_bos=add_bos, share=share)
            if test is None:
                return None
            choice[task.name] = test
        return replace(result, choice=choice)

    @property
    def searches_training_texts(self) -> bool:
        """Whether the run's texts are few enough to be searched for the questions during training."""
        return self._training_texts.tokens <= SEARCHED_TOKENS * self.ranks.world_size

    @property
    def _training_texts(self) -> TrainingTexts:
        return training_texts(self.inputs)

    @cached_property
    def _rewritten(self) -> dict[str, int]:
        """The texts' count for each task, which no evaluation changes."""
        return {task.name: self._training_texts.rewritten(task) for task in self.inputs.tasks}

    def _apart(self, result: EvaluationResult, share: PromptShare) -> EvaluationResult | None:
        """The result, with the scores apart by what the training texts hold; the first evaluation searches them."""
        texts = self._training_texts
        if not self._orders:
            found = find_orders(self.inputs.tasks, texts, share)
            if found is None:
                return None
            self._orders.update(found)
        scores = {
            task.name: apart(
                task,
                result.tasks[task.name],
                self._orders[task.name],
                texts,
                rewritten=self._rewritten[task.name],
            )
            for task in self.inputs.tasks
        }
        return replace(result, training_texts=scores)

    def messages(self, result: EvaluationResult, step: int, total_steps: int) -> Iterator[str]:
        """What the console is told besides the scores: of texts always, of the rest at the first and the last result.

        Of a result that is on no disk rank 0 is told.
        """
        if step in self._unwritten:
            path, why = self.folder.evaluation_file(step), self._unwritten[step][1]
            yield (
                f"WARNING: '{path}' cannot be written: {why}; training goes on, and the next evaluation, or a resume from "
                "this step, writes it"
            )
        for name, text in result.texts.items():
            times = "" if text["times"] is None else f", {text['times']:.2f} × the start"
            yield f"text {name}: perplexity {text['perplexity']:.2f}{times}"
        for name, losses in result.held_out.items():
            found = ", ".join(f"{objective} {x['loss']:.4f}" for objective, x in losses.items())
            yield f"held-out store {name}: loss {found} (nats per target)"
        if not result.tasks or step not in (self.spec.every_steps, total_steps):
            return
        if result.training_texts:
            yield answered_line(result.training_texts)
            yield f"by the order in the training texts: {contamination_line(result)}"
            yield from (f"note: {remark}" for remark in search_notes(result.training_texts))
        else:
            yield (
                f"the training texts have more than {SEARCHED_TOKENS:,} tokens per rank and were not searched for the "
                "questions; bico-ds evaluate --train does it"
            )

    def kept_numbers(self, step: int) -> dict[str, float]:
        """The numbers (`scalars`) of a step's evaluation that is kept in the run folder; none without it. Collective."""
        found: dict[str, float] = {}
        if self.ranks.is_first and (file := self.folder.evaluation_file(step)).is_file():
            with contextlib.suppress(UserError):  # of a damaged one nothing is known
                found = scalars(load_result(file))
        return broadcast_object(found)

    def identity_of(self, metric: str) -> str:
        """A digest of what a metric is measured on (`metric_identity`)."""
        return metric_identity(
            metric,
            tasks=self.inputs.tasks,
            texts=self.inputs.texts,
            held_out=self.inputs.held_out,
            options=options_in_training(self.spec, add_bos=self.inputs.add_bos),
            others=self.spec.likelihood_others,
        )

    def has_result(self, step: int) -> bool:
        """Whether this step's evaluation was completed; for rank 0."""
        return self.folder.has_evaluation(step)

    def above_limit(self, result: EvaluationResult) -> str | None:
        """Which text is above its `stop_if_above`, the same on every rank."""
        return above_limit(result.texts, self.spec.texts)


def training_texts(inputs: RunInputs) -> TrainingTexts:
    """What a run trains on, to be searched for its questions."""
    return TrainingTexts(stores=[(store, inputs.tokenizer) for store in inputs.stores])


def texts_before(inputs: RunInputs, saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The texts' results before training, from a checkpoint's state.

    Raises `UserError` for a text with `stop_if_above` that they do not have: nothing could be compared with its limit.
    """
    before = dict(saved.get("texts_before", {}))
    for text in inputs.texts:
        if text.spec.stop_if_above is not None and reference(text, before) is None:
            raise UserError(
                f"evaluation.tasks: the checkpoint does not know the perplexity of text '{text.spec.name}' before training "
                "(the text, or how it is read, was changed since), so its stop_if_above cannot be judged; leave that out, "
                "or start anew with --resume none"
            )
    return before


def refuse_above_limit(spec: EvaluationSpec, folder: RunFolder, step: int) -> None:
    """Raise `UserError` where the run in `folder` was stopped at this step by a limit of its texts that still holds.

    A batch system would otherwise start it again and again. An evaluation that is broken tells nothing, and is done again.
    """
    file = folder.evaluation_file(step)
    if not spec.texts or not file.is_file():
        return
    try:
        texts = load_result(file).texts
    except UserError:
        return
    if reason := above_limit(texts, spec.texts):
        raise UserError(
            f"step {step}: {reason}. To go on from there all the same, raise the limit or leave it out "
            "(evaluation.tasks); --resume RUN/checkpoints/step-N goes back to an earlier step"
        )


def scalars(result: EvaluationResult) -> dict[str, float]:
    """All metrics by tag, and each task's headline metric as `evaluation/TASK/headline` (`headline_keys`).

    The bounds of its 95 % interval are `headline_low` and `headline_high` beside it, where it is known; as in reports, the
    exact one where all answers are right, or all wrong.
    """
    headlines = {
        f"evaluation/{name}/{key}": task.score
        for name, task in result.tasks.items()
        for key in headline_keys(task)
    }
    bounds = {
        f"evaluation/{name}/headline_{end}": bound
        for name, task in result.tasks.items()
        for end, bound in zip(("low", "high"), task.interval or (), strict=False)
    }
    return headlines | bounds | result.scalars()
