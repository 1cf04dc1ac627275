#!/usr/bin/env python
"""Whole training steps at a given shape: how fast, at what MFU, made of which kernels, and where the host waits.

    python tools/bench/gpu_step.py [--recipe llama3_8b_bico] [--layers 4] [--lengths 40 2048] [--set KEY=VALUE …] [--json]

The engine is the one that launch/train.py builds of the recipe, with so many layers and random weights, on one rank. Each
step trains one micro-batch of `--rows` original tokens, in documents of each length in turn, by next-token prediction
and by BICO at a mask rate of 15 %; with the recipe's attention backend, and with those of `--also`. On a GPU also: memory
by item, where the host waits, and what a step is made of. With the longest documents a *plain* step is timed, too: with
torch's operations around attention's passes, and Hugging Face's norms and gates. step.json in --out has every figure so
far. Compared are BICO steps with NTP steps, the backends, and the plain steps. Exit code 1 where a loss is not what random
weights have, where backends differ, or where a step fails. --rehearse, or a machine without a GPU: everything on the CPU.
"""

from __future__ import annotations

import json
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
import torch
from step_flops import flops_of_step, head_share
from step_memory import (
    beside_plan,
    farthest,
    in_gb,
    measure_memory,
    memory_at_rest,
    phases_in_gb,
    plan_memory,
)
from step_profile import StepProfile, host_waits, profile_step
from step_shapes import (
    FIXED,
    OBJECTIVES,
    TOO_SMALL,
    Bench,
    Steps,
    add_options,
    build,
    check_random_loss,
    check_same,
    contradiction,
    run_tool,
)

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import resolve
from bico_ds.attention.passes import TORCH_PASSES
from bico_ds.batch import PackedBatch
from bico_ds.common.command_line import Command
from bico_ds.config.load import load_recipe
from bico_ds.model.elementwise_kernels import kernels_for, without_kernels
from bico_ds.planner.memory import MemoryPlan
from bico_ds.proof.findings import Findings
from bico_ds.training.planning import device_here

SHOWN = 20  # kernels
ALSO_IN_A_REHEARSAL = ["oracle", "triton"]


def add_all_options(parser: ArgumentParser) -> None:
    add_options(parser, out="runs/gpu_step")
    parser.add_argument(
        "--also",
        nargs="*",
        default=["triton"],
        metavar="BACKEND",
        help="beside the recipe's (default triton)",
    )
    parser.add_argument("--profile", action="store_true", help="profile on a CPU, too")


@dataclass(frozen=True, kw_only=True)
class Way:
    """To compute steps. `is_plain`: without kernels for norms and gates."""

    name: str
    backend: Backend | None
    is_plain: bool = False


class StepBench:
    """Measures steps of every kind and length, backend after backend, into the findings."""

    def __init__(self, bench: Bench, options: Namespace, findings: Findings) -> None:
        self.bench, self.options, self.findings = bench, options, findings
        self.measured: dict[tuple[str, int], dict[str, Steps]] = {}
        self.memory: list[list[Any]] = []
        self.planned: dict[str, MemoryPlan] = {}
        self.device = device_here(bench.device, bench.recipe.model.dtype, ranks_per_node=1)

    def measure_all(self) -> None:
        backends = self.backends()
        ways = [Way(name=name, backend=backend) for name, backend in backends.items()]
        lengths = self.options.lengths
        if (plain := self.plain_way(backends)) is not None:
            ways.append(plain)
        for way in ways:
            with self.by(way):
                for length in [max(lengths)] if way.is_plain else lengths:
                    for kind in OBJECTIVES:
                        if not self.tried(way, kind, length):
                            return

    def tried(self, way: Way, kind: str, length: int) -> bool:
        """Measure; False where the step failed, and left the engine in its middle: nothing more can be measured with it."""
        try:
            self.measure(way, kind, length)
        except Exception as error:
            traceback.print_exc()
            if isinstance(error, torch.OutOfMemoryError) and not self.findings.steps:
                self.findings.not_measured = TOO_SMALL
                return False
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.findings.add_wrong(f"{kind}, documents of {length}, {way.name}: {said}")
            return False
        return True

    @contextmanager
    def by(self, way: Way) -> Iterator[None]:
        """Inside, the model computes in this way."""
        for layer in self.bench.engine.module.causal_lm.model.layers:
            layer.self_attn.packed_backend = way.backend if way.is_plain else way.name
        with without_kernels() if way.is_plain else nullcontext():
            yield

    def plain_way(self, backends: dict[str, Backend | None]) -> Way | None:
        """Of the recipe's backend; None where its steps are plain already."""
        name, backend = next(iter(backends.items()), ("", None))
        if backend is None:
            return None
        plain = replace(backend, passes=TORCH_PASSES)
        if plain == backend and kernels_for(self.bench.config.dtype, self.bench.device) is None:
            return None
        return Way(name=f"{name}, plain", backend=plain, is_plain=True)

    def backends(self) -> dict[str, Backend | None]:
        """The recipe's and those of --also that run here and are not the same; None: the oracle."""
        config = self.bench.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found: dict[str, Backend | None] = {}
        for name in (self.bench.recipe.model.attention_backend, *self.options.also):
            try:
                backend = resolve(name, config.dtype, head_dim, self.bench.device)
            except ValueError as error:
                self.findings.add_note(f"attention backend {name} is not measured: {error}")
                continue
            if (same := next((other for other, one in found.items() if one == backend), None)) is not None:
                self.findings.add_note(f"attention backend {name} is the same as {same} here")
                continue
            found[name] = backend
        return found

    def measure(self, way: Way, kind: str, length: int) -> None:
        """Steps of one kind; but for plain ones also their memory, on a GPU host waits and kernels, too."""
        bench, what = self.bench, f"{kind}, documents of {length}, {way.name}"
        documents = bench.random_documents(length, self.options.rows)
        batch = bench.pack(documents, kind, None if way.backend is None else way.backend.policy)
        steps = bench.time_steps(batch, self.options.steps)
        check_random_loss(self.findings, what, steps, bench.config)
        others = self.measured.setdefault((kind, length), {})
        if others:
            first, other = next(iter(others.items()))
            check_same(self.findings, f"{what} beside {first}", steps, other, bench.recipe.model.dtype)
        others[way.name] = steps
        figures = self.figures(way, kind, length, batch, steps)
        self.findings.add_step(figures)
        self.save()
        if not way.is_plain:
            self.add_details(figures, batch, steps)
            self.save()

    def add_details(self, figures: dict[str, Any], batch: PackedBatch, steps: Steps) -> None:
        """Host waits, memory beside its plan, and what the step is made of."""
        kind, length, name = (figures[key] for key in ("kind", "length", "backend"))
        what = f"{kind}, documents of {length}, {name}"
        bench = self.bench
        if bench.on_cuda:
            figures["host_waits"] = host_waits(lambda: bench.step(batch))
            print(f"  host waits in one step: {figures['host_waits']}", flush=True)
        plan = plan_memory(bench, self.device, name, kind, batch)
        memory = measure_memory(bench, batch) if bench.on_cuda else None
        self.planned.setdefault(f"{kind}, documents of {length}", plan)
        figures["memory"] = beside_plan(memory, plan)
        if memory is not None:
            self.memory.append([what, *phases_in_gb(bench, memory, len(batch.targets))])
            figures["memory_off"] = farthest(figures["memory"])
        if bench.on_cuda or self.options.profile:
            profile = profile_step(lambda: bench.step(batch), on_cuda=bench.on_cuda)
            figures |= self.add_profile(what, profile, steps)

    def save(self) -> None:
        """Everything so far: a run may be cut by a time limit."""
        (self.options.out / "step.json").write_text(json.dumps(self.findings.steps) + "\n")

    def figures(self, way: Way, kind: str, length: int, batch: PackedBatch, steps: Steps) -> dict[str, Any]:
        seconds = steps.median_seconds
        tflops = flops_of_step(self.bench.recipe.model, batch) / seconds / 1e12
        return {
            "kind": kind,
            "length": length,
            "backend": way.name,
            "plain": way.is_plain,
            "rows": len(batch.input_ids),
            "targets": len(batch.targets),
            "head_share": round(head_share(self.bench.recipe.model, batch), 4),
            "ms": round(1e3 * seconds, 2),
            "slowest_ms": round(1e3 * max(steps.seconds), 2),
            "tokens_per_s": round(batch.represented_tokens / seconds),
            "rows_per_s": round(len(batch.input_ids) / seconds),
            "tflops": round(tflops, 4),
            "mfu": self.bench.mfu(tflops),
            "loss": steps.loss,
            "grad_norm": steps.grad_norm,
            "peak_gb": None if steps.peak_bytes is None else round(steps.peak_bytes / 1e9, 1),
        }

    def add_profile(self, what: str, profile: StepProfile | None, steps: Steps) -> dict[str, Any]:
        """Tables of the step's kernels and groups; returns what step.json keeps of them."""
        if profile is None:
            self.findings.add_note(f"{what}: the profiler saw no kernel")
            return {}
        self.findings.add_table(
            f"The {SHOWN} costliest kernels: {what}",
            ["share", "ms", "calls", "kernel"],
            profile.kernel_rows(SHOWN),
        )
        busy = profile.total_ms / 1e3 / steps.median_seconds
        return {
            "groups": profile.group_shares(),
            "busy": round(busy, 3),
            "cuda_waits": {name: [calls, round(ms, 2)] for name, ms, calls in profile.waits},
        }

    def add_tables(self) -> None:
        """Speed, groups, host waits and memory of all steps, each in one table."""
        steps = self.findings.steps
        speed = ["kind", "length", "backend", "rows", "ms", "tokens_per_s", "tflops", "mfu", "peak_gb"]
        self.findings.add_table(
            "Whole steps (tokens: original ones, dropped placeholders among them)",
            speed,
            [[step[column] for column in speed] for step in steps],
        )
        groups = list(dict.fromkeys(group for step in steps for group in step.get("groups", {})))
        self.findings.add_table(
            "Share of kernel time by group (busy: all kernels' time as a share of the step's)",
            ["kind", "length", "backend", "busy", *groups],
            [
                [
                    *(step[column] for column in ("kind", "length", "backend", "busy")),
                    *(f"{step['groups'].get(group, 0):.1%}" for group in groups),
                ]
                for step in steps
                if "groups" in step
            ],
        )
        waits = [
            [step["kind"], step["length"], step["backend"], place, times]
            for step in steps
            for place, times in (step.get("host_waits", {}) | step.get("cuda_waits", {})).items()
        ]
        self.findings.add_table(
            "Where the host waits for the GPU in one step (of CUDA's own calls: how often, and ms in all)",
            ["kind", "length", "backend", "place", "times"],
            waits,
        )
        self.add_memory_tables()

    def add_memory_tables(self) -> None:
        """What was measured, what was planned, and of what the plan is made."""
        any_plan = next(iter(self.planned.values()), None)
        self.findings.add_table(
            "Memory between steps, one rank",
            ["item", "GB", "planned, GB", "measured / planned", "how it is known"],
            [] if any_plan is None else memory_at_rest(self.bench, any_plan),
        )
        self.findings.add_table(
            "Memory within a step, GB over what is there between steps (the head's: arithmetic)",
            ["step", "kept by forward", "of it the head's gradient", "peak of forward", "of it the head's chunk",
             "peak of backward", "peak of update", "held by the allocator, unused at the peak"],
            self.memory,
        )  # fmt: skip
        self.findings.add_table(
            "Memory of all tensors beside the plan, GB",
            ["kind", "length", "backend", "phase", "measured", "planned, from", "to", "measured / planned"],
            [
                [
                    step["kind"],
                    step["length"],
                    step["backend"],
                    phase,
                    of["measured"],
                    *of["planned"],
                    of["ratio"],
                ]
                for step in self.findings.steps
                for phase, of in step.get("memory", {}).items()
            ],
        )
        self.findings.add_table(
            "What the plan's peak is made of, GB",
            ["step", "moment", "item", "from", "to", "by"],
            [
                [what, plan.peak.name, item.name, in_gb(item.bytes.low), in_gb(item.bytes.high), item.how]
                for what, plan in self.planned.items()
                for item in plan.peak.items
                if item.bytes.high
            ],
        )

    def note_depth(self) -> None:
        """Say what few layers do to a comparison: the head is there once, however many layers there are."""
        whole = (load_recipe(self.options.recipe, FIXED).model.config or {}).get("num_hidden_layers")
        few = self.options.layers
        shares = {step["length"]: step["head_share"] for step in self.findings.steps if step["kind"] == "ntp"}
        for length, share in shares.items() if whole else ():
            of_whole = share / (share + (1 - share) * whole / few)
            self.findings.add_note(
                f"documents of {length}: the head is {share:.0%} of an NTP step's operations with {few} layers, "
                f"{of_whole:.0%} with the recipe's {whole}; BICO computes it for few rows, so that the whole model "
                "gains less from BICO's fewer targets than a step here"
            )

    def compare(self) -> None:
        """Rows: a BICO step beside an NTP step of the same documents, and the backends beside the first."""
        median = {
            (kind, length, name): round(1e3 * steps.median_seconds, 3)
            for (kind, length), by_name in self.measured.items()
            for name, steps in by_name.items()
        }
        plain = {step["backend"] for step in self.findings.steps if step["plain"]}
        for kind, length, name in median:
            beside = ("ntp", length, name)
            if kind == "bico" and beside in median:
                title = f"a BICO step beside an NTP step, documents of {length}, {name}"
                self.findings.add_row(title, median[kind, length, name], median[beside], "ms")
        for kind, length, name in median:
            first = next(iter(self.measured[kind, length]))
            if name != first:
                ours, other = (first, name) if name in plain else (name, first)
                title = f"{ours} beside {other}, {kind}, documents of {length}"
                self.findings.add_row(title, median[kind, length, ours], median[kind, length, other], "ms")


def measure_steps(options: Namespace, findings: Findings) -> None:
    if options.rehearse:
        options.also, options.profile = ALSO_IN_A_REHEARSAL, True
    steps = StepBench(build(options, findings), options, findings)
    steps.measure_all()
    steps.add_tables()
    steps.note_depth()
    steps.compare()


def run(options: Namespace) -> int:
    return run_tool(options, partial(measure_steps, options))


main = Command(description=__doc__, add_options=add_all_options, contradiction=contradiction, run=run)


if __name__ == "__main__":
    main.start()
