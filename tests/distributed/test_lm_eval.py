"""lm-eval takes an export as it is, offline, and finds what `bico-ds evaluate` finds (the extra `lm-eval`)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bico_ds.evaluation.scoring.choice import choice_test
from bico_ds.evaluation.scoring.metrics import wrong_answers
from bico_ds.evaluation.tasks.task import Task, load_tasks
from tests.distributed.launching import environment
from tests.distributed.test_exports import OFFLINE, base, with_bos, without_bos, write_lines

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e .[lm-eval]"
    ),
]
__all__ = ["base", "with_bos", "without_bos"]  # fixtures

OTHERS = 3
TASK = """
task: people
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def by_lm_eval(export: Path, task: Task, folder: Path) -> tuple[float, list[list[float]]]:
    """The accuracy, and the log-likelihood of each choice of each question, the right one first."""
    wrong = wrong_answers(task, OTHERS)
    rows: list[dict[str, Any]] = [
        {"prompt": question.prompt, "choices": [question.completion, *theirs], "label": 0}
        for question, theirs in zip(task.questions, wrong, strict=True)
    ]
    write_lines(folder / "people.jsonl", rows)
    (folder / "people.yaml").write_text(TASK.format(file=folder / "people.jsonl"))
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={export}",
            "--include_path", str(folder), "--tasks", "people", "--device", "cpu", "--batch_size", "4",
            "--output_path", str(folder / "out"), "--log_samples",
        ],
        env=environment() | OFFLINE | {"HF_HOME": str(folder / "home")},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    chosen = [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in found]
    return json.loads(results.read_text())["results"]["people"]["acc,none"], chosen


@pytest.mark.parametrize("name", ["with_bos", "without_bos"])
def test_lm_eval_finds_the_log_likelihoods_of_the_forced_choice(base, name, request, tmp_path):
    """Without an option for BOS: the export's tokenizer adds what the texts of its training had."""
    request.getfixturevalue(name)
    export = base / name / "export"
    (task,) = load_tasks(base / "tasks", ["n2d"])
    accuracy, log_likelihoods = by_lm_eval(export, task, tmp_path)
    model = LlamaForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    bos = name == "with_bos"
    own = choice_test(model, tokenizer, task, others=OTHERS, add_bos=bos)
    other = choice_test(model, tokenizer, task, others=OTHERS, add_bos=not bos)
    assert own is not None and other is not None
    assert math.isclose(accuracy, own["forced_choice"])
    # fp32 sums of a few log-probabilities: batches of other shapes add in another order.
    assert torch.allclose(torch.tensor(log_likelihoods), rows(own), atol=1e-4, rtol=0)
    assert not torch.allclose(torch.tensor(log_likelihoods), rows(other), atol=1e-2, rtol=0), (
        "BOS matters here"
    )


def rows(test: dict[str, Any]) -> torch.Tensor:
    right, others = torch.tensor(test["rows"]["right"]), torch.tensor(test["rows"]["others"])
    return torch.cat([right[:, None], others], dim=1)
