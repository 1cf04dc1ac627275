"""Evaluations in training: what becomes of a result that cannot be written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bico_ds.config.load import load_recipe
from bico_ds.evaluation.results import EvaluationResult, TaskResult, load_result
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.evaluator import Evaluator, scalars


@pytest.fixture
def evaluator(tmp_path) -> Evaluator:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return Evaluator(
        spec=load_recipe("tiny_bico").evaluation,
        inputs=SimpleNamespace(tasks=[], texts=[], held_out=[], tokenizer=None, add_bos=False),  # type: ignore[arg-type]  # nothing to ask: the file is what counts
        ranks=Ranks(0, 0, 1, torch.device("cpu")),
        folder=folder,
        stop=StopFlag(),
        on_progress=lambda: None,
    )


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_where_all_answers_are_alike_the_bounds_are_those_of_reports(score):
    """Persons resampled give the score itself for both: nothing would be uncertain."""
    prompts = [{"group": str(person), "contains": score} for person in range(20)]
    task = TaskResult(
        headline="contains",
        metrics={"contains": score},
        intervals={"contains": (score, score)},
        prompts=prompts,
    )
    written = scalars(EvaluationResult(tasks={"n2d_reverse": task}))
    bounds = tuple(written[f"evaluation/n2d_reverse/headline_{end}"] for end in ("low", "high"))
    assert bounds == pytest.approx(((0, 0.1684) if score == 0 else (0.8316, 1)), abs=1e-4)


def test_a_result_that_cannot_be_written_ends_no_run_is_told_and_comes_with_the_next(evaluator):
    folder, model = evaluator.folder, torch.nn.Linear(2, 2)
    folder.evaluation.write_text("a file where the folder should be")
    first = evaluator(model, 5)
    assert first is not None
    (told,) = evaluator.messages(first, 5, 10)
    assert told.startswith(f"WARNING: '{folder.evaluation_file(5)}' cannot be written: File exists")
    assert not evaluator.has_result(5), "a resume from this step evaluates it again"
    folder.evaluation.unlink()
    second = evaluator(model, 10)
    assert second is not None
    assert list(evaluator.messages(second, 10, 20)) == []
    assert load_result(folder.evaluation_file(5)) == first
    assert evaluator.has_result(10)
