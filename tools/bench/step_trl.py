#!/usr/bin/env python
"""SFTTrainer steps with packing, for tools/bench/step.py.

Reads a JSON task, and prints {"tokens_per_cpu_second": …} of the fastest step.

    python tools/bench/step_trl.py TRL_FOLDER BINS THREADS < task.json
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


class CpuClock(TrainerCallback):
    """CPU seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def main() -> None:
    task, bins, steps = json.load(sys.stdin), int(sys.argv[2]), 3
    torch.set_num_threads(int(sys.argv[3]))
    model = LlamaForCausalLM(LlamaConfig(**task["model"])).bfloat16()
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(10, task["model"]["vocab_size"], (length,), generator=generator).tolist()
        for _ in range(bins * steps)
        for length in task["lengths"]
    ]
    clock = CpuClock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            packing=True,
            max_length=task["capacity"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=bins,
            max_steps=steps,
            logging_steps=1,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=_tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    # What a step held is TRL's own count: its packing decides how full a batch is.
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry][:steps]
    tokens = [after - before for before, after in pairwise(counted)]
    best = max(count / seconds for count, seconds in zip(tokens, clock.seconds[1:], strict=True))
    print(json.dumps({"tokens_per_cpu_second": best, "tokens_per_step": tokens}))


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>")


if __name__ == "__main__":
    main()
