"""The reversal tasks during training: the ranks share out the prompts.

It is no callback, because the loop must know whether an evaluation was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from bico_ds.common.files import write_atomically
from bico_ds.config.sections.evaluation import EvaluationSpec
from bico_ds.evaluation.contamination import TrainingTexts, apart, find_orders
from bico_ds.evaluation.replica import full_replica
from bico_ds.evaluation.report.tables import contamination_line, search_notes
from bico_ds.evaluation.results import EvaluationResult, Order
from bico_ds.evaluation.run_tasks import GenerationOptions, evaluate
from bico_ds.evaluation.scoring.choice import choice_test
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.model.weights.materialize import full_numel, is_partitioned
from bico_ds.planner.run_time import REPLICA_PARAMETERS
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.assembly import RunInputs

# Training waits while its texts are searched for the questions: a minute or two for so many tokens per rank.
SEARCHED_TOKENS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates the model in training, and writes the result of every prompt into the run folder.

    `inputs`: the tasks, their tokenizer, and whether prompts begin with BOS. `on_progress`: called after each of this
    rank's batches.
    """

    spec: EvaluationSpec
    inputs: RunInputs
    ranks: Ranks
    folder: RunFolder
    stop: StopFlag
    on_progress: Callable[[], None]
    _orders: dict[str, list[Order]] = field(default_factory=dict, init=False)

    def is_due(self, step: int, total_steps: int) -> bool:
        every = self.spec.every_steps
        return bool(self.inputs.tasks) and (step == total_steps or (every is not None and step % every == 0))

    def __call__(self, causal_lm: PreTrainedModel, step: int) -> EvaluationResult | None:
        """Run all tasks, and write evaluation/step-N.json on rank 0. Collective.

        Returns the same result on every rank, or None on all of them where any was asked to stop meanwhile. Raises
        `UserError` for a prompt that does not fit the model's context.
        """
        partitioned = any(map(is_partitioned, causal_lm.parameters()))
        replicate = partitioned and sum(map(full_numel, causal_lm.parameters())) <= REPLICA_PARAMETERS
        was_training = causal_lm.training
        model = full_replica(causal_lm, device=self.ranks.device) if replicate else causal_lm.eval()
        with torch.no_grad():
            result = self._evaluate(model, synced=partitioned and not replicate)
        causal_lm.train(was_training)
        if result is not None and self.ranks.is_first:
            path = self.folder.evaluation_file(step)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(result.to_json(), ensure_ascii=False, indent=1))
        return result

    def _evaluate(self, model: PreTrainedModel, *, synced: bool) -> EvaluationResult | None:
        """Generated answers, and where the recipe asks for it the log-probability test."""
        share = PromptShare(
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            synced=synced,
            device=self.ranks.device,
            batch_size=self.spec.batch_size,
            should_stop=lambda: bool(self.stop),
            on_batch=lambda sequences: self.on_progress(),
        )
        tasks, tokenizer, add_bos = self.inputs.tasks, self.inputs.tokenizer, self.inputs.add_bos
        options = GenerationOptions(max_new_tokens=self.spec.max_new_tokens, add_bos=add_bos)
        result = evaluate(model, tokenizer, tasks, options, share)
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
        return TrainingTexts(stores=[(store, self.inputs.tokenizer) for store in self.inputs.stores])

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
        """What the console is told of the first and the last result besides its scores; the files have it of all."""
        if step not in (self.spec.every_steps, total_steps):
            return
        if result.training_texts:
            yield f"by the order in the training texts: {contamination_line(result)}"
            yield from (f"note: {remark}" for remark in search_notes(result.training_texts))
        else:
            yield (
                f"the training texts have more than {SEARCHED_TOKENS:,} tokens per rank and were not searched for the "
                "questions; bico-ds evaluate --train does it"
            )

    def has_result(self, step: int) -> bool:
        """Whether this step's evaluation was completed."""
        return self.folder.evaluation_file(step).is_file()


def scalars(result: EvaluationResult) -> dict[str, float]:
    """All metrics by tag, and each task's headline metric as `evaluation/TASK/headline`."""
    headlines = {f"evaluation/{name}/headline": task.score for name, task in result.tasks.items()}
    return headlines | result.scalars()
