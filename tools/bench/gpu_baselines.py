#!/usr/bin/env python
"""Our training steps beside what others would do with the same weights, documents and DeepSpeed configuration.

    python tools/bench/gpu_baselines.py [--recipe llama3_8b_bico] [--layers 4] [--lengths 40 2048] [--set KEY=VALUE …]

BICO: the authors' dense formulation. Next-token prediction: Hugging Face's model, with a document per row and no padding
(its best case: all documents here are equally long), and with all documents packed in one sequence, by flash-attn where
that is installed, else by torch's SDPA; and TRL's SFTTrainer with packing, where TRL is installed (or is in --trl).

All but TRL run in one process, in one DeepSpeed engine around one set of weights, one after the other: the optimizer, its
memory and its time are the same for all, and a loss or gradient norm that differs from ours fails the tool. TRL runs last,
in its own process, with the same configuration; of it the fastest step counts, of the others the median. Compared are
original tokens per second. Out of memory is a baseline's result; no step can follow it, so
the hungriest comes last. --rehearse, or a machine without a GPU: everything on the CPU.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from baseline_batches import ComparedModel, bico_padded, causal_packed, causal_rows
from step_shapes import (
    BICO,
    KEY,
    PLACEHOLDER,
    WARM_UP,
    Bench,
    StepBatch,
    Steps,
    add_options,
    build,
    check_random_loss,
    check_same,
    contradiction,
    run_tool,
)
from transformers.utils import is_flash_attn_2_available

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path
from bico_ds.documents import Documents
from bico_ds.proof.findings import Findings
from bico_ds.runtime import launch_environment

OURS = "ours"
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train on documents for the objective `kind`."""

    kind: str
    name: str
    batch: Callable[[Documents], StepBatch]


def ways(bench: Bench) -> list[Way]:
    """Ours, then the others', in the order in which they are measured."""
    attention = "flash-attn" if uses_flash_attn(bench) else "SDPA"

    def ours(kind: str) -> Way:
        return Way(kind=kind, name=OURS, batch=lambda texts: bench.pack(texts, kind, bench.layout_policy))

    def dense(texts: Documents) -> StepBatch:
        return bico_padded(texts, BICO.policy, KEY, placeholder_id=PLACEHOLDER)

    return [
        ours("ntp"),
        ours("bico"),
        Way(kind="ntp", name=f"Hugging Face, a document per row, {attention}", batch=causal_rows),
        Way(kind="ntp", name=f"Hugging Face, packed, {attention}", batch=causal_packed),
        Way(kind="bico", name="the authors' dense formulation", batch=dense),
    ]


def uses_flash_attn(bench: Bench) -> bool:
    return bench.on_cuda and bench.recipe.model.dtype == "bf16" and is_flash_attn_2_available()


class Comparison:
    """Measures our steps and the others' into the findings."""

    def __init__(self, options: Namespace, findings: Findings) -> None:
        self.options, self.findings = options, findings
        self.ours: dict[tuple[str, int], Steps] = {}
        self.table: list[list[Any]] = []

    def measure_all(self, bench: Bench) -> None:
        """All ways at all lengths; where a step fails, the engine stands in the middle of it, and none can follow."""
        if uses_flash_attn(bench):
            bench.engine.module.causal_lm.set_attn_implementation("flash_attention_2")
        work = [(way, length) for way in ways(bench) for length in self.options.lengths]
        for number, (way, length) in enumerate(work, start=1):
            try:
                self.measure(bench, way, length)
            except Exception as error:
                self.note_failure(way, length, error)
                if left := [title(*what) for what in work[number:]]:
                    self.findings.add_note(f"not measured after it: {'; '.join(left)}")
                return

    def measure(self, bench: Bench, way: Way, length: int) -> None:
        texts = bench.random_documents(length, self.options.rows)
        steps = bench.time_steps(bench.pinned(way.batch(texts)), self.options.steps)
        check_random_loss(self.findings, title(way, length), steps, bench.config)
        if way.name == OURS:
            self.ours[way.kind, length] = steps
        else:
            ours = self.ours[way.kind, length]
            check_same(self.findings, title(way, length), ours, steps, bench.recipe.model.dtype)
        self.add(way, length, len(texts.token_ids) / steps.median_seconds, steps.peak_bytes)

    def add(self, way: Way, length: int, tokens_per_s: float, peak_bytes: int | None) -> None:
        """A line of the table, and for others' ways a row: ours beside it."""
        ratio = None
        if way.name != OURS:
            tokens = length * (self.options.rows // length)
            ours = tokens / self.ours[way.kind, length].median_seconds
            self.findings.add_row(
                f"ours beside {title(way, length)}", round(ours), round(tokens_per_s), "tokens/s"
            )
            ratio = self.findings.rows[-1]["ratio"]
        peak = None if peak_bytes is None else round(peak_bytes / GB, 1)
        self.table.append([way.kind, length, way.name, round(tokens_per_s), peak, ratio])
        print(*self.table[-1], flush=True)

    def note_failure(self, way: Way, length: int, error: Exception) -> None:
        """Out of memory is a result of the others; everything else is wrong."""
        if isinstance(error, torch.OutOfMemoryError) and way.name != OURS:
            self.findings.add_note(f"{title(way, length)}: out of memory")
            self.table.append([way.kind, length, way.name, "out of memory", None, None])
            return
        traceback.print_exc()
        message = next(iter(str(error).splitlines()), "")
        self.findings.add_wrong(f"{title(way, length)}: {type(error).__name__}: {message}")

    def measure_trl(self, task: dict[str, Any]) -> None:
        """SFTTrainer's packing, in a process of its own, on a device that is free by now."""
        if self.options.trl is None and find_spec("trl") is None:
            self.findings.add_note("TRL is not installed: not measured")
            return
        for length in self.options.lengths:
            if ("ntp", length) not in self.ours:
                continue
            way = Way(kind="ntp", name="TRL's SFTTrainer, packed", batch=causal_packed)
            answer = run_trl({**task, "lengths": [length] * (self.options.rows // length)}, self.options.trl)
            if answer is None:
                self.findings.add_note(f"{title(way, length)}: failed, its output is above")
            else:
                self.add(way, length, answer["tokens_per_second"], answer["peak_bytes"])

    def add_table(self) -> None:
        self.findings.add_table(
            "Beside others: the same weights, documents and DeepSpeed configuration on one rank",
            ["kind", "length", "way", "original tokens/s", "peak GB", "ours is … times as fast"],
            self.table,
        )


def title(way: Way, length: int) -> str:
    return f"{way.name}, {way.kind}, documents of {length}"


def trl_task(bench: Bench, options: Namespace) -> dict[str, Any]:
    """What step_trl.py needs of ours: the model, the same DeepSpeed configuration, as many steps."""
    return {
        "model": bench.recipe.model.config,
        "dtype": bench.recipe.model.dtype,
        "capacity": options.rows,
        "steps": WARM_UP + options.steps,
        "recompute": bench.recipe.model.activation_checkpointing > 0,
        "deepspeed": bench.ds_config,
    }


def run_trl(task: dict[str, Any], folder: Path | None) -> dict[str, Any] | None:
    """Its tokens per second, by its own count, and its peak of device memory; None where it fails."""
    bins, threads = 1, torch.get_num_threads()
    script = Path(__file__).with_name("step_trl.py")
    address = {"MASTER_PORT": str(launch_environment.free_port())}
    answer = subprocess.run(
        [sys.executable, str(script), str(folder or "."), str(bins), str(threads)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **address},
    )
    if answer.returncode:
        print(answer.stderr[-2000:], file=sys.stderr, flush=True)
        return None
    return json.loads(answer.stdout.splitlines()[-1])


def add_all_options(parser: ArgumentParser) -> None:
    add_options(parser, out="runs/gpu_baselines")
    parser.add_argument(
        "--trl", type=local_path, metavar="FOLDER", help="where TRL is, if it is not installed"
    )


def measure_ours_and_theirs(options: Namespace, findings: Findings, comparison: Comparison) -> dict[str, Any]:
    """All that runs in one engine, which is gone afterwards; returns TRL's task."""
    bench = build(options, findings, wrap=ComparedModel.around)
    comparison.measure_all(bench)
    bench.engine.destroy()
    return trl_task(bench, options)


def note_memory_held(findings: Findings) -> None:
    """TRL's process has the device for itself, but for what of ours is not freed."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        if (held := torch.cuda.memory_allocated()) > GB:
            findings.add_note(f"while TRL ran, {held / GB:.1f} GB of our engine were still held")


def measure_ways(options: Namespace, findings: Findings) -> None:
    comparison = Comparison(options, findings)
    task = measure_ours_and_theirs(options, findings, comparison)
    note_memory_held(findings)
    comparison.measure_trl(task)
    comparison.add_table()


def run(options: Namespace) -> int:
    return run_tool(options, partial(measure_ways, options))


main = Command(description=__doc__, add_options=add_all_options, contradiction=contradiction, run=run)


if __name__ == "__main__":
    main.start()
