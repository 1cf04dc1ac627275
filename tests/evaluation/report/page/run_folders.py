"""Run folders as a training leaves them, with figures drawn anew for each test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bico_ds.config.load import dump_recipe, load_recipe
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.evaluation.scoring.statistics import share_interval
from bico_ds.evaluation.tasks.task import TASK_NAMES

STARTED, SECONDS_PER_STEP = 1_790_000_000, 0.5
PERSONS, PROMPTS = 20, 80


def task_result(
    right: Sequence[bool], *, prediction: str = "it is {}", metric: str = "contains"
) -> TaskResult:
    """Prompts of `PERSONS` persons with these answers."""
    prompts = [
        {
            "prompt": f"question {number} |",
            "answer": f" answer {number}",
            "prediction": prediction.format(f"answer {number}" if is_right else "nobody"),
            "group": str(number % PERSONS),
            "line": number + 1,
            metric: float(is_right),
        }
        for number, is_right in enumerate(right)
    ]
    scores = [prompt[metric] for prompt in prompts]
    interval = share_interval(scores, [prompt["group"] for prompt in prompts])
    return TaskResult(
        headline=metric,
        metrics={metric: sum(scores) / len(scores)},
        intervals={metric: interval},
        floors={metric: 0.01},
        new_tokens=8,
        scoring=2,
        prompts=prompts,
    )


def run_folder(
    path: Path,
    scores: Mapping[str, float] | None = None,
    *,
    recipe: str = "tiny_bico",
    overrides: Sequence[str] = (),
    steps: Sequence[int] = (100, 200, 300),
    logged: int = 30,
    texts: Mapping[str, Sequence[float]] | None = None,
    prediction: str = "it is {}",
) -> Path:
    """A run that is done, whose tasks have these scores at its last step, and half of them before.

    `texts`: the perplexities of texts by their names, at each step; the base has 12.
    """
    rng = np.random.default_rng()
    last = steps[-1]
    path.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "kind": "train",
            "loss/all": 1 + 3 / (1 + step / 50) + rng.normal() / 20,
            "loss/bico": 1.5 + 3 / (1 + step / 50) + rng.normal() / 20,
            "speed/represented_tokens_per_second": 9000 + 500 * rng.normal(),
            "speed/kept_tokens_per_second": 8000 + 500 * rng.normal(),
            "speed/step_seconds": SECONDS_PER_STEP,
            "speed/mfu": 0.31,
            "speed/mfu/bico": 0.24,
            "memory/peak_gb": 1.5,
            "work/updates/bico": step,
            "work/steps/bico": step,
            "work/rows/bico": 500 * step,
            "work/tokens/bico": 600 * step,
            "work/seconds/bico": step * SECONDS_PER_STEP,
            "work/flops/bico": 1e9 * step,
        }
        for step in np.linspace(1, last, logged).astype(int).tolist()
    ]
    named = scores or {}
    for number, step in enumerate(steps):
        record: dict[str, Any] = {"step": step, "kind": "evaluation"}
        for task, score in named.items():
            record[f"evaluation/{task}/contains"] = score if step == last else score / 2
        for text, perplexities in (texts or {}).items():
            record[f"evaluation/text/{text}/perplexity"] = perplexities[number]
            record[f"evaluation/text/{text}/times_base"] = perplexities[number] / 12
        lines += [record] if len(record) > 2 else []
    lines.append({"step": last, "kind": "checkpoint", "speed/checkpoint_seconds": 0.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if named:
        results = {
            task: task_result([n < round(score * PROMPTS) for n in range(PROMPTS)], prediction=prediction)
            for task, score in named.items()
        }
        (path / "evaluation").mkdir()
        content = json.dumps(EvaluationResult(tasks=results).to_json())
        (path / "evaluation" / f"step-{last:06d}.json").write_text(content)
    write_records(path, recipe=recipe, overrides=overrides, last=last)
    return path


def write_records(path: Path, *, recipe: str, overrides: Sequence[str], last: int) -> None:
    """recipe.yaml, run.json and state.json."""
    (path / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe, [f"name={path.name}", *overrides])))
    start = {
        "run_id": "abc",
        "time": "2026-09-21T14:13:20+0000",
        "command": [
            "launch/train.py",
            "--local_rank=0",
            "--recipe",
            recipe,
            "--set",
            "description=two words",
        ],
        "host": "node7",
        "job": "",
        "python": "3.11.7",
        "versions": {"bico_ds": "0.1.0", "torch": "2.13.0"},
        "commit": "c0ffee" * 6,
        "hosts": ["node7", "node7"],
        "plan": {
            "device": "a CPU, 2 ranks on the host",
            "peak_flops": 1.3e11,
            "step_seconds/bico/measured": 0.107,
            "step_seconds/bico/low": 0.016,
            "step_seconds/bico/high": 0.022,
            "step_seconds/bico/ratio": 5.6,
        },
    }
    (path / "run.json").write_text(json.dumps([start]))
    end = STARTED + last * SECONDS_PER_STEP
    state = {"state": "done", "step": last, "reason": "", "run_id": "abc", "time": end}
    (path / "state.json").write_text(json.dumps(state) + "\n")
    (path / "last_checkpoint.json").write_text(json.dumps({"step": last, "path": "x", "time": end - 1}))


def scores_of(reverse: float, forward: float = 1.0) -> dict[str, float]:
    """Scores of the four tasks."""
    return {task: reverse if task.endswith("_reverse") else forward for task in TASK_NAMES}
