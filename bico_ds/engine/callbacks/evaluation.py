"""The reversal tasks during training. Collective: every rank takes an equal share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bico_ds.config.schema import EvaluationSpec
from bico_ds.engine.distributed import Ranks
from bico_ds.engine.run_folder import RunFolder, write_atomically
from bico_ds.engine.signals import StopFlag
from bico_ds.evaluation.choice import choice_test
from bico_ds.evaluation.generation import Ranks as SharedRanks
from bico_ds.evaluation.suite import EvaluationResult, evaluate
from bico_ds.evaluation.tasks import Task
from bico_ds.evaluation.zero3 import is_partitioned, parameter_count, whole_replica

# A bf16 copy of so many parameters fits beside a training state on an 80 GB GPU; larger models generate partitioned.
REPLICA_PARAMETERS = 4_000_000_000
FOLDER = "evaluation"  # in the run folder


class Evaluator:
    """Evaluates the live model and keeps the row-level results in the run folder."""

    def __init__(
        self,
        spec: EvaluationSpec,
        tasks: list[Task],
        tokenizer: Any,
        ranks: Ranks,
        folder: RunFolder,
        stop: StopFlag,
        *,
        add_bos: bool,
        on_progress: Callable[[], None],
    ) -> None:
        """`add_bos`: prompts begin as the training texts do. `on_progress`: called after each batch."""
        self._add_bos = add_bos
        self._spec, self._tasks, self._tokenizer = spec, tasks, tokenizer
        self._ranks, self._folder, self._stop, self._on_progress = ranks, folder, stop, on_progress

    def is_due(self, step: int, total_steps: int) -> bool:
        every = self._spec.every_steps
        return bool(self._tasks) and (step == total_steps or (every is not None and step % every == 0))

    def __call__(self, causal_lm: Any, step: int) -> EvaluationResult | None:
        """Run all tasks; on rank 0 write evaluation/step-N.json. None where a signal came meanwhile."""
        partitioned = is_partitioned(causal_lm)
        replicate = partitioned and parameter_count(causal_lm) <= REPLICA_PARAMETERS
        was_training = causal_lm.training
        model = whole_replica(causal_lm, device=self._ranks.device) if replicate else causal_lm.eval()
        with torch.no_grad():
            result = self._evaluate(model, synced=partitioned and not replicate)
        causal_lm.train(was_training)
        if result is not None and self._ranks.is_first:
            path = self._path(step)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(result.to_json(), ensure_ascii=False, indent=1))
        return result

    def _evaluate(self, model: Any, *, synced: bool) -> EvaluationResult | None:
        """Generated answers, and where the recipe asks for it the log-probability test."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        common: dict[str, Any] = {
            "batch_size": self._spec.batch_size,
            "device": self._ranks.device,
            "should_stop": lambda: bool(self._stop),
            "add_bos": self._add_bos,
        }
        result = evaluate(
            model,
            self._tokenizer,
            self._tasks,
            max_new_tokens=self._spec.max_new_tokens,
            rank=rank,
            world_size=world_size,
            synced=synced,
            on_batch=lambda task, prompts: self._on_progress(),
            **common,
        )
        if result is None or self._spec.likelihood_others is None:
            return result
        choice: dict[str, Any] = {}
        for task in self._tasks:
            choice[task.name] = choice_test(
                model,
                self._tokenizer,
                task,
                others=self._spec.likelihood_others,
                ranks=SharedRanks(rank=rank, world_size=world_size, synced=synced),
                on_batch=lambda prompts: self._on_progress(),
                **common,
            )
            if choice[task.name] is None:
                return None
        return replace(result, choice=choice)

    def has_result(self, step: int) -> bool:
        """Whether this step's evaluation came to its end."""
        return self._path(step).is_file()

    def _path(self, step: int) -> Path:
        return self._folder.path / FOLDER / f"step-{step:06d}.json"


def results_after(run: Path, step: int) -> list[Path]:
    """The results of a run folder that belong to later steps."""
    found = sorted((run / FOLDER).glob("step-*.json"))
    return [path for path in found if int(path.stem.removeprefix("step-")) > step]


def scalars(result: EvaluationResult) -> dict[str, float]:
    """All metrics, and each task's headline under a tag of its own."""
    headlines = {f"evaluation/{name}/headline": task.score for name, task in result.tasks.items()}
    return headlines | result.scalars()
