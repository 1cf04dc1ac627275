"""Two real processes under DeepSpeed ZeRO-3: every way to evaluate gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.runtime.launch_environment import free_port
from tests import ROOT

_PROGRAM = """
import json, os, sys
import deepspeed, torch, torch.distributed as dist
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from bico_ds.common.process_end import end_process
from bico_ds.evaluation.scoring.generation import encode_prompts, generate_greedy
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.evaluation.replica import full_replica
from bico_ds.model.weights.materialize import full_numel, is_partitioned

folder, out = sys.argv[1:3]
torch.set_num_threads(1)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
rank = dist.get_rank()
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
size = sum(map(full_numel, model.parameters()))
engine, *_ = deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3}, "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
model = engine.module
assert all(map(is_partitioned, model.parameters()))
assert sum(map(full_numel, model.parameters())) == size
prompts = encode_prompts(tokenizer, json.loads(os.environ["PROMPTS"]))
def run(m, **options):
    share = PromptShare(rank=rank, world_size=2, batch_size=4, **options)
    return generate_greedy(m, tokenizer, prompts, max_new_tokens=9, share=share)

replica = full_replica(model, device="cpu")
assert not any(map(is_partitioned, replica.parameters()))
result = {
    "synced": run(model, synced=True),
    "replica": run(replica),
    "stopped": run(model, synced=True, should_stop=lambda: rank == 1),
    "synced_again": run(model, synced=True),
}
with open(f"{out}.{rank}", "w") as file:
    json.dump(result, file)
dist.barrier()
dist.destroy_process_group()
end_process(0)
"""


@pytest.mark.distributed
def test_zero3_evaluation_on_two_ranks_equals_one_process(tiny_llama, tokenizer, tmp_path):
    from bico_ds.evaluation.scoring.generation import encode_prompts, generate_greedy
    from bico_ds.evaluation.scoring.share import PromptShare

    prompts = [" ".join(f"w{(7 * i + j * j) % 40}" for j in range(1 + i % 6)) for i in range(11)]
    encoded, share = encode_prompts(tokenizer, prompts), PromptShare(batch_size=4)
    expected = generate_greedy(tiny_llama, tokenizer, encoded, max_new_tokens=9, share=share)
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results = _run_two_ranks(tmp_path, prompts)
    assert results[0] == results[1]
    assert results[0]["stopped"] is None
    for way in ("synced", "replica", "synced_again"):
        assert results[0][way] == expected, way


def _run_two_ranks(tmp_path: Path, prompts: list[str]) -> list[dict]:
    common = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "PROMPTS": json.dumps(prompts), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "model"), str(tmp_path / "out")]
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=150)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
