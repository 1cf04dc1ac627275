"""What the GPU benches of attention share: inputs, plans, errors beside the oracle, and times of the device alone."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import KERNELS, TRITON
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import CUDA_POLICY, TILES_POLICY, Layout, LayoutPolicy, build_layout
from bico_ds.attention.measured_policy import Comparison
from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.packed import run_packed_attention
from bico_ds.attention.passes import HIDDEN_COLUMNS, TORCH_PASSES, Passes
from bico_ds.attention.plan import AttentionPlan, Mode, build_plan
from bico_ds.attention.triton.ops import tiling_on, triton_refusal
from bico_ds.attention.triton.passes import TRITON_PASSES
from bico_ds.common.errors import UserError
from bico_ds.config.arguments import positive_number
from bico_ds.proof.findings import Findings

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
WARM_UP, REPEATS = 3, 10
TILES = "dense tiles"
IN_TILES = replace(CUDA_POLICY, hidden_cost=math.inf)
AS_HIDDEN_KEYS = replace(CUDA_POLICY, hidden_cost=0.0)
# Bounds of the scale's error and of the largest one (`Comparison`): results that are 1 % too large are found in every dtype,
# and so is a wrong row. On a CPU rounding gave 7e-4 and 1.4e-2 in bf16, 7e-5 and 1.8e-3 in fp16.
BOUNDS = {torch.bfloat16: (3e-3, 3e-2), torch.float16: (1e-3, 6e-3), torch.float32: (1e-5, 1e-4)}
FIRST_FIGURE_S = 30.0  # what has sent nothing after so long hangs; compiling the first kernels takes less
_SECONDS_TO_LEAVE = 5.0  # of a process that is done; one that hangs in the driver is killed
_FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds
_CYCLES_PER_SECOND = 2e9  # of the device's clock, about


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of q, k and v, and the device that holds them: Llama-3-8B's, or that of a rehearsal."""

    heads: int = HEADS
    key_heads: int = KEY_HEADS
    head_dim: int = HEAD_DIM
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


LLAMA_8B = Shape()
REHEARSAL = Shape(heads=2, key_heads=1, head_dim=16, dtype=torch.float32, device="cpu")


def random_inputs(rows: int, shape: Shape = LLAMA_8B) -> list[Tensor]:
    """q, k, v (which require gradients), cos, sin, and the gradient of the output."""
    generator = torch.Generator(shape.device).manual_seed(0)
    settings: dict[str, Any] = {"generator": generator, "device": shape.device, "dtype": shape.dtype}
    random = lambda n: torch.randn(rows, n, shape.head_dim, **settings)  # noqa: E731
    frequency = 10000.0 ** -(torch.arange(0, shape.head_dim, 2, device=shape.device) / shape.head_dim)
    angle = torch.arange(rows, device=shape.device)[:, None] * torch.cat([frequency, frequency])
    q, k, v = (random(n).requires_grad_() for n in (shape.heads, shape.key_heads, shape.key_heads))
    return [q, k, v, angle.cos().to(shape.dtype), angle.sin().to(shape.dtype), random(shape.heads)]


def plan_with_live(kept: list[int], share: float) -> AttentionPlan:
    """Documents with live rows, a given share of all rows, spread evenly over their kept tokens."""
    counts = [int(length * share / (1 - share)) for length in kept]
    document = torch.repeat_interleave(torch.tensor(counts))
    pairs = zip(kept, counts, strict=True)
    splits = [torch.linspace(1, length, count).round().long() for length, count in pairs]
    return build_plan(
        "bidirectional", kept_lengths=kept, live_document=document, live_split=torch.cat(splits)
    )


def documents(mode: Mode, length: int, rows: int, live_share: float = 0.0) -> AttentionPlan:
    """As many documents of `length` tokens as `rows` hold, at least one; a share of the tokens are live placeholders."""
    kept = [length - math.ceil(length * live_share)] * max(1, rows // length)
    return plan_with_live(kept, live_share) if live_share else build_plan(mode, kept_lengths=kept)


def flash_kernels(shape: Shape) -> dict[str, CausalKernel]:
    """Those that can run here."""
    return {name: kernel for name, kernel in KERNELS.items() if refusal(name, shape) is None}


def refusal(name: str, shape: Shape) -> str | None:
    """Why a backend cannot serve such inputs here, as a clause; torch's own operations always can."""
    if name == TRITON:
        return triton_refused(shape)
    asked = shape.dtype, shape.head_dim, shape.torch_device
    return KERNELS[name].refusal(*asked) if name in KERNELS else None


def triton_refused(shape: Shape) -> str | None:
    return triton_refusal(shape.dtype, shape.head_dim, shape.torch_device)


def can_hide_keys(kernel: CausalKernel, shape: Shape) -> bool:
    if kernel.hides_keys:
        return True
    return kernel.refusal(shape.dtype, shape.head_dim + HIDDEN_COLUMNS, shape.torch_device) is None


def any_kernel(shape: Shape) -> CausalKernel:
    """For a backend whose layouts ask no flash kernel."""
    return KERNELS["cpu-flash" if shape.device == "cpu" else "aten-cuda"]


def passes_of(shape: Shape) -> Passes:
    """What surrounds a flash kernel's passes here, unasked whether it is right: that is to be found out."""
    return TORCH_PASSES if triton_refused(shape) else TRITON_PASSES


def flash_backend(kernel: CausalKernel, shape: Shape, policy: LayoutPolicy = IN_TILES) -> Backend:
    return Backend(kernel=kernel, policy=policy, passes=passes_of(shape))


def beside_triton(kernel: CausalKernel, shape: Shape, *, flash_from: float) -> Backend:
    """A flash kernel for documents of at least so many tokens; the Triton kernels for the others, and for live rows."""
    blocks = tiling_on(shape.torch_device, shape.head_dim).blocks
    return flash_backend(kernel, shape, replace(IN_TILES, flash_from=flash_from, blocks=blocks))


def run(
    backend: Backend, tensors: list[Tensor], plan: AttentionPlan, layout: Layout | None = None
) -> list[Tensor]:
    """out and the gradients of q, k, v. Without a `layout` the call makes one."""
    q, k, v, cos, sin, grad_out = tensors
    scale = q.shape[-1] ** -0.5
    out = run_packed_attention(q, k, v, cos, sin, plan, scale=scale, backend=backend, layout=layout)
    return [out.detach(), *torch.autograd.grad(out, tensors[:3], grad_out)]


def compare(name: str, case: str, backend: Backend, plan: AttentionPlan, shape: Shape) -> Comparison:
    """The backend's out and gradients beside the fp64 oracle's; `plan` on the CPU."""
    plan = plan.to(shape.device)
    tensors = random_inputs(plan.num_rows, shape)
    q, k, v, cos, sin, grad_out = tensors
    out = oracle_attention(q, k, v, cos, sin, plan, shape.head_dim**-0.5)
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    pairs = list(zip(run(backend, tensors, plan), expected, strict=True))
    scale, largest = torch.stack([_errors(a.double(), b.double()) for a, b in pairs]).amax(0).tolist()
    scale_bound, largest_bound = BOUNDS[shape.dtype]
    return Comparison(
        backend=name,
        case=case,
        dtype=shape.dtype_name,
        head_dim=shape.head_dim,
        scale_error=scale if math.isfinite(scale) else None,
        scale_bound=scale_bound,
        largest_error=largest if math.isfinite(largest) else None,
        largest_bound=largest_bound,
    )


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    """[2]: of the scale, and the largest; NaN passes through."""
    scale = (found * expected).sum() / expected.square().sum()
    return torch.stack([(scale - 1).abs(), (found - expected).abs().max() / expected.abs().max()])


def checked_cases(name: str, shape: Shape, kept: list[int]) -> Iterator[tuple[str, AttentionPlan, Backend]]:
    """Every kind of rows that the backend can serve, in documents of so many kept tokens."""
    causal, bidirectional = (build_plan(mode, kept_lengths=kept) for mode in ("causal", "bidirectional"))
    live = plan_with_live(kept, 0.3)
    if name == TRITON:
        kernel = any_kernel(shape)
        fused = beside_triton(kernel, shape, flash_from=math.inf)
        yield from (
            ("causal", causal, fused),
            ("bidirectional", bidirectional, fused),
            ("live rows", live, fused),
        )
        if refusal(kernel.name, shape) is None:
            mixed = beside_triton(kernel, shape, flash_from=max(kept) / 2)
            yield "live rows, long documents by flash", live, mixed
        return
    if name == TILES:
        tiles = Backend(kernel=any_kernel(shape), policy=TILES_POLICY)
        yield from (("causal", causal, tiles), ("live rows", live, tiles))
        return
    kernel = KERNELS[name]
    flash = flash_backend(kernel, shape)
    yield from (("causal", causal, flash), ("bidirectional", bidirectional, flash))
    yield "live rows in tiles", live, flash
    if can_hide_keys(kernel, shape):
        yield "live rows as hidden keys", live, replace(flash, policy=AS_HIDDEN_KEYS)


def errors(item: Comparison) -> str:
    parts = {"scale": item.scale_error, "largest": item.largest_error}
    return ", ".join(f"{name} {'not finite' if x is None else f'{x:.1e}'}" for name, x in parts.items())


def describe_comparison(item: Comparison) -> str:
    verdict = "right" if item.is_right else "WRONG"
    return f"{item.backend}, {item.case}, {item.dtype}, head dimension {item.head_dim}: {errors(item)}: {verdict}"


def milliseconds(work: Callable[[], object], repeats: int = REPEATS, device: str = "cuda") -> float:
    """Of one call on the device: the median by its own events, after a warm-up, each with a cold L2 cache.

    The device sleeps before each call for longer than the host needs to enqueue it: the time is never the host's. On the CPU
    it is one call by the clock, for rehearsals.
    """
    if device == "cpu":
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    host = 0.0
    for _ in range(WARM_UP):
        started = time.perf_counter()
        work()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(int((2 * host + 1e-3) * _CYCLES_PER_SECOND))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def op_milliseconds(backend: Backend, plan: AttentionPlan, shape: Shape = LLAMA_8B) -> float:
    """Of the op, forward and backward, with its layout made beforehand, as by a worker of the loader."""
    tensors = random_inputs(plan.num_rows, shape)
    layout = build_layout(plan, backend.policy).to(shape.device).with_masks(shape.dtype)
    return milliseconds(lambda: run(backend, tensors, plan, layout), device=shape.device)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the work of a process ended; `problem` is None where it was done.

    `excused`: it had no more time, and had sent figures or had begun late; or needs more memory than this GPU has. `late`:
    it had no more time.
    """

    problem: str | None
    excused: bool = False
    late: bool = False


Send = Callable[[Any], None]


def each_alone(work: Callable[..., None], *arguments: Any, deadline: float) -> Iterator[Any]:
    """What `work(send, *arguments)` sends, as it comes; at last how it `Ended`.

    It runs in a process of its own: after an error of CUDA every later call of a process fails. `deadline`: when it is
    killed, by `time.monotonic`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # nothing that initializes CUDA, which no fork survives
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work_and_send, args=(work, sender, arguments), daemon=True)
    process.start()
    sender.close()
    item, begun = None, time.monotonic()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            item = receiver.recv()
            yield item
            if isinstance(item, Ended):
                process.join(_SECONDS_TO_LEAVE)
                return
        in_time = item is not None or deadline - begun < FIRST_FIGURE_S
        yield Ended(problem="was not done within --seconds", excused=in_time, late=True)
    except EOFError:
        process.join()
        yield Ended(problem=f"its process died, exit code {process.exitcode}")
    finally:
        process.kill()


def _work_and_send(work: Callable[..., None], sender: Connection, arguments: tuple[Any, ...]) -> None:
    ended = Ended(problem=None)
    try:
        work(sender.send, *arguments)
    except torch.OutOfMemoryError:
        ended = Ended(problem="needs more memory than this GPU has", excused=True)
    except Exception as error:  # whatever a kernel raises is a finding, and the other backends go on
        ended = Ended(problem=f"{type(error).__name__}: {str(error)[:300]}")
    sender.send(ended)


def add_end(findings: Findings, name: str, ended: Ended) -> None:
    """Note a problem; one without an excuse is wrong."""
    if ended.problem is not None:
        (findings.add_note if ended.excused else findings.add_wrong)(f"{name}: {ended.problem}")


def add_bench_options(parser: ArgumentParser, *, seconds: float) -> None:
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=seconds,
        help=f"what is not measured by then is left out (default {seconds})",
    )
    parser.add_argument("--rehearse", action="store_true", help="everything on the CPU, at a tiny size")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def prepare(*, rehearse: bool) -> None:
    """Before anything imports triton. Raises `UserError` where there is no GPU and this is no rehearsal."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        print("REHEARSAL on a CPU, at a tiny size: its figures say nothing of any GPU", flush=True)
    elif not torch.cuda.is_available():
        raise UserError("no CUDA device: nothing to measure (--rehearse runs all of it on the CPU)")
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
