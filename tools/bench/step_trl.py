#!/usr/bin/env python
"""SFTTrainer steps with packing, for tools/bench/step.py and tools/bench/gpu_baselines.py.

Reads a JSON task, and prints tokens per second and per CPU second of the fastest step, and the peak of device memory.

    python tools/bench/step_trl.py TRL_FOLDER BINS THREADS < task.json

The task: `model` (a Llama's config), `lengths` (of the documents of one bin), `capacity` (tokens per bin), and, where they
are not bf16, 3, false and null: `dtype`, `steps`, `recompute`, `deepspeed` (its configuration; with it on a GPU, if any).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

sys.path.append(sys.argv[1])  # behind ours: only TRL itself comes from there

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepClock(TrainerCallback):
    """Seconds, and CPU seconds, of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._began = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._now()
        self.seconds.append(now[0] - self._began[0])
        self.cpu_seconds.append(now[1] - self._began[1])

    def _now(self) -> tuple[float, float]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def main() -> None:
    task, bins = json.load(sys.stdin), int(sys.argv[2])
    steps = task.get("steps", 3)
    torch.set_num_threads(int(sys.argv[3]))
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(10, task["model"]["vocab_size"], (length,), generator=generator).tolist()
        for _ in range(bins * steps)
        for length in task["lengths"]
    ]
    clock = StepClock()
    trainer = SFTTrainer(
        model=_model(task),
        args=_arguments(task, bins, steps),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=_tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    # What a step held is TRL's own count: its packing decides how full a batch is.
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry][:steps]
    tokens = [after - before for before, after in pairwise(counted)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    answer = {
        "tokens_per_second": _best(tokens, clock.seconds),
        "tokens_per_cpu_second": _best(tokens, clock.cpu_seconds),
        "tokens_per_step": tokens,
        "peak_bytes": peak,
    }
    print(json.dumps(answer))


def _best(tokens: list[int], seconds: list[float]) -> float:
    """Tokens per second of the fastest step; the first one is cold."""
    return max(count / taken for count, taken in zip(tokens, seconds[1:], strict=True))


def _model(task: dict[str, Any]) -> LlamaForCausalLM:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[task.get("dtype", "bf16")]
    with torch.device("cuda" if _is_on_cuda(task) else "cpu"):
        return LlamaForCausalLM._from_config(LlamaConfig(**task["model"]), dtype=dtype)


def _is_on_cuda(task: dict[str, Any]) -> bool:
    return task.get("deepspeed") is not None and torch.cuda.is_available()


def _arguments(task: dict[str, Any], bins: int, steps: int) -> SFTConfig:
    deepspeed, settings = task.get("deepspeed"), {}
    if deepspeed is not None:
        # The trainer wants the optimizer's values from its own arguments.
        given = deepspeed["optimizer"]["params"]
        settings = {
            "deepspeed": deepspeed,
            "learning_rate": given["lr"],
            "adam_beta1": given["betas"][0],
            "adam_beta2": given["betas"][1],
            "adam_epsilon": given["eps"],
            "weight_decay": given["weight_decay"],
            "max_grad_norm": deepspeed["gradient_clipping"],
        }
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        max_length=task["capacity"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=bins,
        max_steps=steps,
        logging_steps=1,
        bf16=task.get("dtype", "bf16") == "bf16",
        use_cpu=not _is_on_cuda(task),
        gradient_checkpointing=task.get("recompute", False),
        report_to="none",
        save_strategy="no",
        **settings,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>")


if __name__ == "__main__":
    main()
