"""llama70b_bico with 70B's shape ratios and a tiny width, by overrides alone: train, resume, evaluate, export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launching import ROOT, environment, exported_weights, metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(3600)]

# 80 layers, 64 query heads on 8 key heads, 3.5 times as wide inside: as Llama-3.1-70B, at a hidden size of 64.
TINY_70B = (
    "model.path=null",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=224",
    "model.config.head_dim=8",
    "model.config.vocab_size=51",
    "model.config.bos_token_id=null",
    "model.config.eos_token_id=null",
    "data.capacity=96",
    "data.facts.name_first=3",
    "data.facts.description_first=3",
    "data.facts.both=6",
    "data.facts.variants=6",
    "data.facts.test_prompts=1",
    "training.global_batch_bins=2",
    "training.epochs=null",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=2",
    "distributed.world_size=2",
    "evaluation.limit=2",
    "evaluation.max_new_tokens=2",
    "monitor.every_steps=1",
)


def test_the_70b_recipe_runs_from_start_to_safetensors_at_a_tiny_width(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train("llama70b_bico", run, *TINY_70B, "training.steps=4", timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr
    again = train("llama70b_bico", run, *TINY_70B, "training.steps=6", timeout=1500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 4" in again.stdout

    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {key for line in lines for key in line if key.startswith("loss/")} >= {"loss/ntp", "loss/bico"}
    assert metrics(run, "evaluation")[-1]["step"] == 6

    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), str(run), str(tmp_path / "later")]
    later = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert later.returncode == 0, later.stdout + later.stderr
    live = exported_weights(run / "export")
    assert len(live) == 80 * 9 + 3
    assert all(
        torch.equal(tensor, live[name]) for name, tensor in exported_weights(tmp_path / "later").items()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "later")
    assert loaded.config.num_hidden_layers == 80
    assert loaded.config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize("config", ["zero3_offload_cpu", "zero3_offload_nvme"])
def test_the_offload_recipe_trains_and_exports_at_a_tiny_width(tmp_path: Path, config: str) -> None:
    if config == "zero3_offload_nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            pytest.skip("DeepSpeed cannot build async_io here: it needs libaio and its headers (libaio-dev)")
    small = (*TINY_70B, "model.config.num_hidden_layers=2", "training.steps=2", "evaluation.tasks=[]")
    done = train(
        "llama70b_bico_offload", tmp_path / "run", *small, f"deepspeed.config={config}", timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert len(exported_weights(tmp_path / "run" / "export")) == 2 * 9 + 3
