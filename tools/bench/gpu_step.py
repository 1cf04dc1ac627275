#!/usr/bin/env python
"""Whole training steps at a given shape: how fast, at what MFU, made of which kernels, and where the host waits.

    python tools/bench/gpu_step.py [--recipe llama3_8b_bico] [--layers 4] [--lengths 40 2048] [--set KEY=VALUE …] [--json]

The engine is the one that launch/train.py builds of the recipe, with so many layers and random weights, on one rank. Each
step trains one micro-batch of `--rows` original tokens, in documents of each length in turn, by next-token prediction
and by BICO at a mask rate of 15 %. On a GPU a step is also run with torch's warnings about synchronization, and profiled.
On a CPU it is a rehearsal. step.json in --out has every figure; --json compares a BICO with an NTP step.
"""

from __future__ import annotations

import collections
import json
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.batch import PackedBatch
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path, path_text, positive
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.schema import Recipe
from bico_ds.documents import Document, Documents
from bico_ds.model.build import build_model
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.materialize import full_numel
from bico_ds.objectives.base import BatchKey, Objective
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.runtime import deepspeed_ops, distributed
from bico_ds.training.build_engine import wrap_model
from bico_ds.training.checks import check_backend, check_recipe

PEAK_FLOPS = 989e12  # dense bf16 products of an H100 or H200 (SXM), by NVIDIA's data sheet
OBJECTIVES: dict[str, Objective] = {
    "ntp": NextTokenPrediction(spec=NtpSpec()),
    "bico": MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.15)), placeholder_id=0),
}
WARM_UP = 2
SHOWN = 14  # kernels


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model in its engine, and how its batches are laid out."""

    engine: Engine
    device: torch.device
    layout_policy: LayoutPolicy | None
    trained_weights: int  # of the decoder layers' matrices
    frozen_weights: int

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def step(self, batch: PackedBatch) -> torch.Tensor:
        """One optimizer step; returns the loss's sum."""
        loss = self.engine(batch.to(self.device, non_blocking=True))
        self.engine.backward(loss / max(len(batch.targets), 1), scale_wrt_gas=False)
        self.engine.step()
        return loss

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", type=path_text, default="llama3_8b_bico", metavar="NAME|PATH")
    parser.add_argument("--layers", type=positive, default=4, help="decoder layers (default 4)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[40, 2048], help="tokens per document")
    parser.add_argument("--rows", type=positive, default=8192, help="original tokens per step (default 8192)")
    parser.add_argument("--steps", type=positive, default=4, help="steps timed (default 4)")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY.PATH=VALUE"
    )
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/gpu_step"), metavar="DIR", help="for step.json"
    )
    parser.add_argument("--profile", action="store_true", help="profile on a CPU, too")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def contradiction(options: Namespace) -> str | None:
    longest = max(options.lengths)
    if longest > options.rows:
        return f"--lengths: a document of {longest} tokens does not fit --rows {options.rows}"
    return None


def build(recipe: Recipe, options: Namespace) -> Bench:
    """Build what launch/train.py would, on this one rank."""
    ranks = distributed.read_ranks()
    on_cuda = ranks.device.type == "cuda"
    config = check_recipe(recipe, world_size=1, on_cuda=on_cuda, run_folder=options.out)
    policy = check_backend(recipe, ranks.device)
    deepspeed_ops.prefer_own_ninja()
    store = distributed.connect(ranks, timeout_minutes=5)
    distributed.join(ranks, store, timeout_minutes=5)
    started = time.perf_counter()
    model = build_model(
        recipe.model, seed=0, ds_config=config, device=ranks.device, longest_document=options.rows
    )
    sizes = {name: full_numel(p) for name, p in model.named_parameters()}
    engine = wrap_model(model, recipe, config, steps=1000)
    optimizer = type(engine.optimizer.optimizer).__name__
    print(
        f"built in {time.perf_counter() - started:.1f} s, {sum(sizes.values()) / 1e9:.2f} G parameters, "
        f"optimizer {optimizer}",
        flush=True,
    )
    matrices = {name: p for name, p in model.named_parameters() if ".layers." in name and "norm" not in name}
    trained = sum(sizes[name] for name, p in matrices.items() if p.requires_grad)
    frozen = sum(sizes[name] for name in matrices) - trained
    return Bench(
        engine=engine,
        device=ranks.device,
        layout_policy=policy,
        trained_weights=trained,
        frozen_weights=frozen,
    )


def make_batch(bench: Bench, objective: Objective, length: int, rows: int) -> PackedBatch:
    """A micro-batch as the loader's worker returns it."""
    vocabulary = bench.engine.module.config.vocab_size
    random = np.random.default_rng(0)
    documents = [
        Document(token_ids=random.integers(5, vocabulary, length), source=0, id=i)
        for i in range(rows // length)
    ]
    batch = objective.build(Documents.of(documents), BatchKey(seed=0, epoch=0))
    if bench.layout_policy is not None:
        batch = replace(batch, layout=build_layout(batch.plan, bench.layout_policy))
    return batch.pin_memory() if bench.on_cuda else batch


def flops(bench: Bench, batch: PackedBatch) -> float:
    """Operations of one step, forward and backward, nothing counted twice for recomputation.

    Products of layers and head (a frozen weight has no gradient to compute), and attention over the pairs of a query and a
    key that it sees.
    """
    config, plan = bench.engine.module.config, batch.plan
    head_dim = config.hidden_size // config.num_attention_heads
    kept = plan.cu_seqlens.diff().double()
    live = torch.bincount(plan.live_document, minlength=len(kept))
    pairs = float((kept * (kept + 1) / 2 if plan.mode == "causal" else kept * (kept + live)).sum())
    attention = 12 * pairs * config.num_attention_heads * head_dim * config.num_hidden_layers
    head = 6 * config.vocab_size * config.hidden_size * len(batch.targets)
    layers = (6 * bench.trained_weights + 4 * bench.frozen_weights) * len(batch.input_ids)
    return layers + head + attention


def measure(bench: Bench, name: str, length: int, options: Namespace) -> dict[str, Any]:
    """Time steps of one kind; on a GPU also print where the host waits and what the step is made of."""
    batch = make_batch(bench, OBJECTIVES[name], length, options.rows)
    for _ in range(WARM_UP):
        bench.step(batch)
    bench.synchronize()
    started = time.perf_counter()
    for _ in range(options.steps):
        loss = bench.step(batch)
    bench.synchronize()
    seconds = (time.perf_counter() - started) / options.steps
    rate = flops(bench, batch) / seconds
    figures = {
        "kind": name,
        "length": length,
        "rows": len(batch.input_ids),
        "ms": round(1e3 * seconds, 2),
        "rows_per_s": round(len(batch.input_ids) / seconds),
        "tflops": round(rate / 1e12, 4),
        "mfu": round(rate / PEAK_FLOPS, 5),
        "loss": loss.item() / max(len(batch.targets), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if bench.on_cuda else None,
    }
    print(json.dumps(figures), flush=True)
    if bench.on_cuda:
        print(f"  host waits in one step: {host_waits(lambda: bench.step(batch))}", flush=True)
    if bench.on_cuda or options.profile:
        print_profile(bench, batch)
    return figures


def host_waits(step: Callable[[], object]) -> dict[str, int]:
    """Places at which the host waited for the GPU, and how often."""
    seen: collections.Counter[str] = collections.Counter()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    for warning in found:
        if "synchroniz" in str(warning.message):
            seen[f"{warning.filename.split('site-packages/')[-1]}:{warning.lineno}"] += 1
    return dict(seen.most_common(12))


def print_profile(bench: Bench, batch: PackedBatch) -> None:
    """The most expensive kernels of one step, by their own time on the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if bench.on_cuda:
        kinds, key = [torch.profiler.ProfilerActivity.CUDA, *kinds], "self_device_time_total"
    with torch.profiler.profile(activities=kinds) as profile:
        bench.step(batch)
        bench.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key, 0))
    total = sum(getattr(event, key, 0) for event in events)
    for event in events[:SHOWN]:
        own = getattr(event, key, 0)
        print(f"    {own / total:6.1%} {own / 1e3:9.2f} ms {event.count:6d}x {event.key[:90]}")


def compare(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A BICO step beside an NTP step of the same documents."""
    by_kind = {(row["kind"], row["length"]): row["ms"] for row in figures}
    lengths = sorted({row["length"] for row in figures})
    pairs = [(length, by_kind["bico", length], by_kind["ntp", length]) for length in lengths]
    return [
        {
            "name": f"BICO beside NTP, documents of {n}",
            "ours": a,
            "other": b,
            "unit": "ms",
            "ratio": round(a / b, 3),
        }
        for n, a, b in pairs
    ]


def run(options: Namespace) -> None:
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    one_rank = ["training.global_batch_bins=1", "training.micro_batch_bins=1", "distributed.world_size=null"]
    shape = [f"model.config.num_hidden_layers={options.layers}", "model.path=null"]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to '{options.out}': {error.strerror}") from None
    recipe = load_recipe(options.recipe, [*shape, *one_rank, *options.overrides])
    bench = build(recipe, options)
    figures = [measure(bench, name, n, options) for n in options.lengths for name in OBJECTIVES]
    (options.out / "step.json").write_text(json.dumps(figures) + "\n")
    distributed.leave()
    if options.json:
        print(json.dumps({"rows": compare(figures)}))


main = Command(description=__doc__, add_options=add_options, contradiction=contradiction, run=run)


if __name__ == "__main__":
    main.start()
