"""All weights trained against a stored teacher, as a user does it: prepare, store, train."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.commands.prepare.command import main
from tests.distributed.launching import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_divergence_is_nothing_at_the_start_and_grows_as_the_model_learns(
    tiny_llama, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("base")
    tokenizer.save_pretrained("base")
    random = np.random.default_rng()
    lines = [
        {"text": " ".join(f"w{word}" for word in random.integers(0, 40, length))}
        for length in random.integers(3, 80, 60)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["files", "texts.jsonl", "--tokenizer", "base", "--output", "store", "--processes", "1"]) == 0
    stored = ["--store", "store", "--capacity", "48", "--top-k", "8", "--dtype", "fp32"]
    assert main(["teacher", "--model", "base", *stored, "--output", "teacher"]) == 0
    done = train(
        "tiny_bico",
        tmp_path / "run",
        "model.path=base",
        "model.config=null",
        "data.sources=[{store: store}]",
        "data.capacity=48",
        "objectives=[{kind: ntp}]",
        "retention={kl: 0.1, teacher: teacher}",
        "evaluation.tasks=[]",
        "training.steps=6",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
        "monitor.every_steps=1",
        "checkpoint.export=false",
        ranks=1,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    divergences = [line["loss/divergence"] for line in metrics(tmp_path / "run")]
    assert len(divergences) == 6
    assert abs(divergences[0]) < 1e-5 < 1e-3 < divergences[-1]
