#!/usr/bin/env python
"""What a full training step of a 135 M Llama costs on a CPU: BICO beside NTP, both beside the machine's limit.

    python tools/bench/step.py [--bins 4] [--threads 1] [--stage 3] [--trl FOLDER] [--json]

A step is the real one: DeepSpeed's engine on one rank with the shipped ZeRO configuration, bf16, `--bins`
micro-batches of 2048 original tokens each, backward, optimizer. Times are CPU seconds, the least of several steps, so
that other work on the machine counts little; divide by the threads for the time on a quiet machine.

The limit: 6 operations per parameter and token, at the rate of a 2048-cubed bf16 product measured in the same
run. Shares come from one profiled step; optimizer and engine are what a step takes beyond its forward and backward
passes. `--trl`: a folder made by `pip install --target FOLDER trl`; its SFTTrainer packs the same documents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table

from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path, positive
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.schema import Recipe
from bico_ds.documents import Documents
from bico_ds.model.weights.materialize import full_numel
from bico_ds.objectives.base import BatchKey, Objective
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction

CAPACITY = 2048
RANK_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
LLAMA_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}
OBJECTIVES: dict[str, Objective] = {
    "ntp": NextTokenPrediction(spec=NtpSpec()),
    "bico": MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.15)), placeholder_id=0, special_ids=(0, 1, 2)),
}


def document_lengths(kind: str) -> list[int]:
    """One bin: documents of 30 to 50 tokens, or a single one."""
    if kind == "long":
        return [CAPACITY]
    lengths = np.random.default_rng(1).integers(30, 51, 200)
    whole = lengths[: int(np.searchsorted(lengths.cumsum(), CAPACITY))].tolist()
    return [*whole, CAPACITY - sum(whole)] if sum(whole) < CAPACITY else whole


def batches(kind: str, objective: str, bins: int) -> list[PackedBatch]:
    """Micro-batches as the loader's workers hand them over."""
    lengths = document_lengths(kind)
    random, zeros = np.random.default_rng(2), np.zeros(len(lengths), np.int64)
    built = [
        OBJECTIVES[objective].build(
            Documents(
                token_ids=random.integers(10, LLAMA_135M["vocab_size"], CAPACITY),
                offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
                source=zeros,
                id=np.arange(len(lengths)) + 1000 * index,
                piece=zeros,
                prompt_length=zeros,
                group=zeros - 1,
            ),
            BatchKey(seed=1, epoch=0),
        )
        for index in range(bins)
    ]
    head_dim = LLAMA_135M["hidden_size"] // LLAMA_135M["num_attention_heads"]
    backend = resolve("auto", torch.bfloat16, head_dim, torch.device("cpu"))
    assert backend is not None
    return [replace(batch, layout=build_layout(batch.plan, backend.policy)) for batch in built]


def build_engine(bins: int, stage: int) -> Any:
    """DeepSpeed's engine around the model, on one rank, as launch/train.py would build it but for the schedule."""
    import deepspeed

    from bico_ds.model.build import build_model
    from bico_ds.runtime import host_memory
    from bico_ds.runtime.ds_config import build_ds_config

    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "model": {"config": LLAMA_135M, "dtype": "bf16"},
            "data": {"sources": [{"facts": "all"}], "capacity": CAPACITY},
            "objectives": [{"kind": "ntp"}],
            "training": {"steps": 1, "global_batch_bins": bins},
            "deepspeed": {"config": f"zero{stage}_bf16"},
        }
    )
    os.environ.update(RANK_VARIABLES)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    config = build_ds_config(
        recipe, world_size=1, hidden_size=LLAMA_135M["hidden_size"], on_cuda=False, run_folder=Path("runs")
    )
    model = build_model(recipe.model, seed=1, ds_config=config, device="cpu")
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config, dist_init_required=False
    )
    host_memory.keep_freed_pages()
    return engine


def train_step(engine: Any, micro_batches: list[PackedBatch]) -> float:
    """One optimizer step; returns the CPU seconds of forward and backward alone."""
    inside = 0.0
    for batch in micro_batches:
        started = time.process_time()
        engine.backward(engine(batch).loss / (len(micro_batches) * CAPACITY))
        inside += time.process_time() - started
        engine.step()
    return inside


def least_cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Least CPU time over `repeats` runs after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def matmul_rate() -> float:
    """bf16 operations per CPU second of a 2048-cubed product."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    return 2 * 2048**3 / least_cpu_seconds(lambda: a @ b, repeats=10)


def shares(engine: Any, micro_batches: list[PackedBatch]) -> dict[str, float]:
    """Parts of one profiled step, as shares of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        passes = 0.0
        for batch in micro_batches:
            begun = time.perf_counter()
            engine.backward(engine(batch).loss / CAPACITY)
            passes += time.perf_counter() - begun
            engine.step()
        total = time.perf_counter() - started
    seconds = {event.key: event.cpu_time_total / 1e6 for event in profile.key_averages()}
    products = sum(seconds.get(name, 0.0) for name in ("aten::mm", "aten::addmm_", "aten::addmm"))
    head = seconds.get("_ChunkedCrossEntropy", 0.0)
    head_products = sum(
        event.cpu_time_total / 1e6
        for event in profile.events()
        if event.name in ("aten::mm", "aten::addmm_") and _inside(event, "_ChunkedCrossEntropy")
    )
    attention = sum(
        value for key, value in seconds.items() if key in ("_PackedAttention", "_PackedAttentionBackward")
    )
    parts = {
        "attention": attention,
        "linear layers": products - head_products,
        "head and loss": head,
        "optimizer and engine": total - passes,
    }
    return {name: value / total for name, value in {**parts, "rest": total - sum(parts.values())}.items()}


def _inside(event: Any, name: str) -> bool:
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def trl_speed(folder: Path, kind: str, bins: int, threads: int) -> float | None:
    """Tokens per CPU second of SFTTrainer, by its own count, in its own process; None where it fails."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("step_trl.py")),
        str(folder),
        str(bins),
        str(threads),
    ]
    answer = subprocess.run(
        command,
        input=json.dumps({"model": LLAMA_135M, "lengths": document_lengths(kind), "capacity": CAPACITY}),
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
    )
    if answer.returncode:
        print(f"TRL's step failed:\n{answer.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(answer.stdout.splitlines()[-1])["tokens_per_cpu_second"]


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--bins", type=positive, default=4, help="micro-batches per step (default 4)")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=3, help="ZeRO stage (default 3)")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument(
        "--trl", type=local_path, metavar="FOLDER", help="where TRL is installed; left out: not compared"
    )
    parser.add_argument("--json", action="store_true")


def run(options: Namespace) -> None:
    torch.set_num_threads(options.threads)
    console = Console(soft_wrap=True)

    rate = matmul_rate()
    engine = build_engine(options.bins, options.stage)
    parameters = sum(map(full_numel, engine.module.parameters()))
    limit = rate / (6 * parameters)
    console.print(f"bf16 product: {rate / 1e9:.0f} GFLOP per CPU second; {parameters / 1e6:.1f} M parameters")

    tokens = options.bins * CAPACITY
    rows: list[tuple[str, float, float, str, float]] = []
    for kind in ("short", "long"):
        seconds = {}
        for objective in OBJECTIVES:
            work = batches(kind, objective, options.bins)
            seconds[objective] = least_cpu_seconds(partial(train_step, engine, work), options.repeats)
            parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(engine, work).items())
            speed = tokens / seconds[objective]
            console.print(f"{kind}, {objective}: {seconds[objective]:.2f} CPU s per step; {parts}")
            rows.append((f"{objective} {kind}: of the limit", speed, limit, "tokens/CPU s", speed / limit))
        rows.append(
            (f"BICO step / NTP step, {kind}", seconds["bico"], seconds["ntp"], "CPU s",
             seconds["bico"] / seconds["ntp"])
        )  # fmt: skip
        other = trl_speed(options.trl, kind, options.bins, options.threads) if options.trl else None
        if other is not None:
            rows.append(
                (f"NTP against TRL, {kind}", tokens / seconds["ntp"], other, "tokens/CPU s",
                 tokens / seconds["ntp"] / other)
            )  # fmt: skip
    print_rows(console, rows)
    if options.json:
        keys = ("name", "ours", "other", "unit", "ratio")
        print(json.dumps({"rows": [dict(zip(keys, row, strict=True)) for row in rows]}))


def print_rows(console: Console, rows: list[tuple[str, float, float, str, float]]) -> None:
    ratios = Table("what", "ours", "other", "unit", "ratio")
    for name, ours, other, unit, ratio in rows:
        ratios.add_row(name, f"{ours:.2f}", f"{other:.2f}", unit, f"{ratio:.2f}")
    console.print(ratios)


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
