"""Evaluations in training: what becomes of a result that cannot be written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bico_ds.config.load import load_recipe
from bico_ds.evaluation.results import load_result
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.runtime.signals import StopFlag
from bico_ds.training.evaluator import Evaluator


@pytest.fixture
def evaluator(tmp_path) -> Evaluator:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return Evaluator(
        spec=load_recipe("tiny_bico").evaluation,
        inputs=SimpleNamespace(tasks=[], texts=[], tokenizer=None, add_bos=False),  # type: ignore[arg-type]  # nothing to ask: the file is what counts
        ranks=Ranks(0, 0, 1, torch.device("cpu")),
        folder=folder,
        stop=StopFlag(),
        on_progress=lambda: None,
    )


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
