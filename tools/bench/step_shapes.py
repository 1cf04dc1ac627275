"""What gpu_step.py and gpu_baselines.py share: options, the engine of a recipe with so many layers, batches, timed steps.

The learning rate is so small that no weight changes: every step of a process trains the same random weights, so that
losses and gradient norms of different kernels and formulations can be compared, and show what is wrong. A step costs what
it costs at any other rate.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from step_profile import optimizer_phase

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import local_path, path_text, positive
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.schema import Recipe
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.planner.devices import device_named
from bico_ds.proof.findings import Findings
from bico_ds.runtime import deepspeed_ops, distributed
from bico_ds.training.build_engine import wrap_model
from bico_ds.training.checks import check_backend, check_recipe

PLACEHOLDER = 0
NTP = NextTokenPrediction(spec=NtpSpec())
BICO = MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.15)), placeholder_id=PLACEHOLDER)
OBJECTIVES: dict[str, NextTokenPrediction | MaskDenoising] = {"ntp": NTP, "bico": BICO}
KEY = BatchKey(seed=0, epoch=0)
# The first steps compile kernels, fill the allocator's cache, and record ZeRO-3's order of modules.
WARM_UP = 3
REHEARSAL = {"recipe": "tiny_bico", "layers": 2, "rows": 128, "lengths": [16, 64], "steps": 1}
FIXED = [
    "model.path=null",
    "training.global_batch_bins=1",
    "training.micro_batch_bins=1",
    "distributed.world_size=null",
]
TOO_SMALL = "this GPU's memory does not hold the model with its optimizer; give fewer --layers"
NO_CHANGE = "optimizer.lr=1e-12"  # below the spacing of fp32 numbers at the size of a weight
# Two ways to compute one step: how far their mean losses, in nats, may be apart, and their gradient norms, as a share.
LOSS_TOLERANCE = {"bf16": 2e-3, "fp32": 1e-4}
NORM_TOLERANCE = {"bf16": 1e-2, "fp32": 1e-3}
# Of a mean loss at random weights from the expected one, in nats; over the few targets of a rehearsal it varies most.
RANDOM_LOSS_TOLERANCE = 0.3


class StepBatch(Protocol):
    """A micro-batch that the engine's model takes: a `PackedBatch`, or a baseline's."""

    @property
    def targets(self) -> torch.Tensor: ...

    def to(self, device: torch.device, *, non_blocking: bool) -> Any: ...

    def pin_memory(self) -> Any: ...


Pinnable = TypeVar("Pinnable", bound=StepBatch)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Timed steps of one micro-batch; `losses` are means over its targets, in nats."""

    seconds: list[float]
    losses: list[float]
    grad_norms: list[float]
    peak_bytes: int | None  # of device memory allocated; None on a CPU

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def loss(self) -> float:
        return self.losses[-1]

    @property
    def grad_norm(self) -> float:
        return self.grad_norms[-1]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model in its engine, on one rank."""

    recipe: Recipe
    ds_config: dict[str, Any]
    engine: Engine
    device: torch.device
    layout_policy: LayoutPolicy | None  # of the recipe's attention backend
    peak_tflops: float | None  # None: not known, or no bf16 model

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def config(self) -> Any:
        return self.engine.module.config

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """The sum of the losses of the batch's targets."""
        return self.engine(batch.to(self.device, non_blocking=True)).loss

    def backward(self, loss: torch.Tensor, targets: int) -> None:
        self.engine.backward(loss / max(targets, 1), scale_wrt_gas=False)

    def update(self) -> float:
        """The optimizer step; returns the gradient's norm."""
        with optimizer_phase():
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def step(self, batch: StepBatch) -> tuple[float, float]:
        """One optimizer step; returns mean loss and gradient norm, for which the host waits as the trainer does."""
        loss, targets = self.forward(batch), len(batch.targets)
        self.backward(loss, targets)
        norm = self.update()
        return loss.item() / max(targets, 1), norm

    def time_steps(self, batch: StepBatch, steps: int) -> Steps:
        """Time so many steps, none of them cold."""
        for _ in range(WARM_UP):
            self.step(batch)
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        times, results = [], []
        for _ in range(steps):
            self.synchronize()
            started = time.perf_counter()
            results.append(self.step(batch))
            self.synchronize()
            times.append(time.perf_counter() - started)
        losses, norms = (list(column) for column in zip(*results, strict=True))
        peak = torch.cuda.max_memory_allocated() if self.on_cuda else None
        return Steps(seconds=times, losses=losses, grad_norms=norms, peak_bytes=peak)

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def pack(self, documents: Documents, kind: str, policy: LayoutPolicy | None) -> PackedBatch:
        """Documents as one micro-batch of ours, as the loader's worker returns it."""
        batch = OBJECTIVES[kind].build(documents, KEY)
        if policy is not None:
            batch = replace(batch, layout=build_layout(batch.plan, policy))
        return self.pinned(batch)

    def pinned(self, batch: Pinnable) -> Pinnable:
        """In page-locked memory, for copies to CUDA."""
        return batch.pin_memory() if self.on_cuda else batch

    def random_documents(self, length: int, rows: int) -> Documents:
        """Documents of `length` tokens each, as many as fit `rows`; the same in every call."""
        random = np.random.default_rng(0)
        return Documents.of(
            [
                Document(token_ids=random.integers(5, self.config.vocab_size, length), source=0, id=i)
                for i in range(rows // length)
            ]
        )

    def mfu(self, tflops: float) -> float | None:
        return None if self.peak_tflops is None else round(tflops / self.peak_tflops, 4)


def check_random_loss(findings: Findings, what: str, steps: Steps, config: Any) -> None:
    """Random weights: hidden states of unit mean square, so the logits' variance is hidden_size * initializer_range²."""
    if not all(map(math.isfinite, (*steps.losses, *steps.grad_norms))):
        findings.add_wrong(f"{what}: losses {steps.losses}, gradient norms {steps.grad_norms}")
        return
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    if abs(steps.loss - expected) > RANDOM_LOSS_TOLERANCE:
        findings.add_wrong(
            f"{what}: loss {steps.loss:.4f}, at random weights about {expected:.2f} is expected"
        )


def check_same(findings: Findings, what: str, ours: Steps, other: Steps, dtype: str) -> None:
    """Two ways to compute the same step of the same weights, in bf16 or fp32."""
    if not abs(ours.loss - other.loss) <= LOSS_TOLERANCE[dtype]:
        findings.add_wrong(f"{what}: losses {ours.loss:.5f} and {other.loss:.5f} of the same batch")
    if not abs(ours.grad_norm - other.grad_norm) <= NORM_TOLERANCE[dtype] * abs(other.grad_norm):
        findings.add_wrong(
            f"{what}: gradient norms {ours.grad_norm:.5f} and {other.grad_norm:.5f} of the same batch"
        )


def add_options(parser: ArgumentParser, *, out: str) -> None:
    parser.add_argument("--recipe", type=path_text, default="llama3_8b_bico", metavar="NAME|PATH")
    parser.add_argument("--layers", type=positive, default=4, help="decoder layers (default 4)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[40, 2048], help="tokens per document")
    parser.add_argument("--rows", type=positive, default=8192, help="original tokens per step (default 8192)")
    parser.add_argument("--steps", type=positive, default=4, help="steps timed (default 4)")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY.PATH=VALUE"
    )
    parser.add_argument("--out", type=local_path, default=Path(out), metavar="DIR", help=f"(default {out})")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything at a tiny size on the CPU, to see that it runs"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def contradiction(options: Namespace) -> str | None:
    longest = max(options.lengths)
    if longest > options.rows:
        return f"--lengths: a document of {longest} tokens does not fit --rows {options.rows}"
    return None


def prepare(options: Namespace) -> None:
    """Make the output folder; with --rehearse take the tiny shape, and leave a GPU alone.

    Raises `UserError` where it cannot be written.
    """
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to '{options.out}': {error.strerror}") from None
    if not options.rehearse:
        return
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # DeepSpeed chose its device when it was imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "DS_ACCELERATOR": "cpu"})
    vars(options).update(REHEARSAL)
    print("a rehearsal: no figure of it tells anything of a GPU", flush=True)


def build(
    options: Namespace,
    findings: Findings,
    wrap: Callable[[TrainableModel], TrainableModel] = lambda model: model,
) -> Bench:
    """Build what launch/train.py would, on this one rank; `wrap` may put another model around ours."""
    shape = [f"model.config.num_hidden_layers={options.layers}", *FIXED]
    recipe = load_recipe(options.recipe, [*shape, *options.overrides, NO_CHANGE])
    ranks = distributed.read_ranks()
    on_cuda = ranks.device.type == "cuda"
    ds_config = check_recipe(recipe, world_size=1, on_cuda=on_cuda, run_folder=options.out)
    policy = check_backend(recipe, ranks.device)
    deepspeed_ops.prefer_own_ninja()
    deepspeed_ops.write_readable_architectures()
    deepspeed_ops.release_abandoned_locks()
    store = distributed.connect(ranks, timeout_minutes=5)
    distributed.join(ranks, store, timeout_minutes=5)
    started = time.perf_counter()
    model = build_model(
        recipe.model,
        seed=0,
        ds_config=ds_config,
        device=ranks.device,
        longest_document=max(options.lengths),
    )
    engine = wrap_model(wrap(model), recipe, ds_config, steps=1000)
    optimizer = type(engine.optimizer.optimizer).__name__
    gpu = torch.cuda.get_device_name() if on_cuda else None
    known = device_named(gpu) if gpu is not None and recipe.model.dtype == "bf16" else None
    peak = None if known is None else known.bf16_flops / 1e12
    if peak is not None:
        findings.add_note(
            f"MFU: model FLOPs, by the planner's convention, of {peak:g} dense bf16 TFLOP/s ({gpu})"
        )
    elif gpu is not None:
        findings.add_note(f"no MFU: no peak of {recipe.model.dtype} products is known for {gpu}")
    print(f"built in {time.perf_counter() - started:.1f} s, optimizer {optimizer}", flush=True)
    return Bench(
        recipe=recipe,
        ds_config=ds_config,
        engine=engine,
        device=ranks.device,
        layout_policy=policy,
        peak_tflops=peak,
    )


def run_tool(options: Namespace, measure: Callable[[Findings], None]) -> int:
    """Prepare, let `measure` fill the findings, leave the process group; returns the tool's exit code.

    A GPU whose memory does not hold the model is no failure.
    """
    prepare(options)
    findings = Findings()
    try:
        measure(findings)
        distributed.leave()
    except torch.OutOfMemoryError:
        findings.not_measured = TOO_SMALL
    return findings.finish(as_json=options.json)
