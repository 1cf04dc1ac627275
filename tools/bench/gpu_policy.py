#!/usr/bin/env python
"""Which attention kernel should serve which rows on this machine's GPU: measured, and written as `auto` reads it.

    python tools/bench/gpu_policy.py [--out FILE] [--seconds 50] [--rehearse] [--json]

In bf16 with Llama-3-8B's heads, at head dimension 128 and then 64. First the time of each flash kernel, by which `auto`
orders them. Then for each of them, the fastest first: the document length from which its passes are faster than the Triton
kernels, bidirectional and causal; and the cost of a live row's pairs of query and key in either, and with hidden keys
(`LayoutPolicy`). Then whether all are right in fp16, and the same beside dense tiles.
A crossover lies between two measured lengths, where the ratio of the times is 1 on
logarithmic scales; where the other way still is faster at the longest length, it is that length. Costs are the median over
lengths and shares of live rows.

The same run compares every backend that it times with the fp64 oracle; the file holds the errors, and `auto` takes only
what is right. What is not measured after --seconds is left out. Exit code 1 where something is wrong.
With --rehearse all of it runs on the CPU, at a tiny size, and writes a file that `auto` refuses.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import this_checkout  # noqa: F401  first on sys.path
import torch
from attention_cases import (
    AS_HIDDEN_KEYS,
    IN_TILES,
    LLAMA_8B,
    REHEARSAL,
    TILES,
    Ended,
    Send,
    Shape,
    add_bench_options,
    add_end,
    beside_triton,
    can_hide_keys,
    checked_cases,
    compare,
    describe_comparison,
    documents,
    each_alone,
    flash_backend,
    flash_kernels,
    op_milliseconds,
    prepare,
    refusal,
)

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import KERNELS, TRITON
from bico_ds.attention.measured_policy import (
    Alternative,
    Comparison,
    KernelTime,
    MeasuredPolicy,
    Measurement,
    encode,
    file_name,
    running_versions,
)
from bico_ds.attention.plan import Mode, build_plan
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.arguments import local_path
from bico_ds.proof.findings import Findings
from bico_ds.proof.machine import driver_version

MODES: tuple[Mode, ...] = ("bidirectional", "causal")
CLEAR_LEAD = 1.15  # of the flash kernel at a length, after which no longer document is measured


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`shapes`: at which costs are measured. `rows` per batch, in documents of each of `lengths`.

    `timed_lengths`: of the documents by which flash kernels are ordered. `live_lengths` x `live_shares`: of those by which
    live rows are measured.
    """

    shapes: tuple[Shape, ...]
    checked: tuple[int, ...]
    rows: int
    lengths: tuple[int, ...]
    timed_lengths: tuple[int, ...]
    live_lengths: tuple[int, ...]
    live_shares: tuple[float, ...]


ON_GPU = Sizes(
    shapes=(LLAMA_8B, replace(LLAMA_8B, head_dim=64)),
    checked=(300, 1, 77, 513),
    rows=8192,
    # On an H200 two passes overtook the Triton kernels at 3729 tokens; longer documents took most of the time.
    lengths=(40, 128, 512, 1024, 2048, 4096, 8192),
    timed_lengths=(512, 2048),
    live_lengths=(512, 4096),
    live_shares=(0.1, 0.4),
)
ON_CPU = Sizes(
    shapes=(REHEARSAL,),
    checked=(20, 1),
    rows=16,
    lengths=(4, 16),
    timed_lengths=(8,),
    live_lengths=(16,),
    live_shares=(0.4,),
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How long a flash kernel takes for all documents alone."""

    kernel: str
    head_dim: int
    times: tuple[KernelTime, ...]

    @property
    def total_ms(self) -> float:
        return sum(time.ms for time in self.times)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where a flash kernel overtakes another way: `times` holds (tokens per document, flash's ms, the other's ms)."""

    kernel: str
    other: str
    head_dim: int
    mode: Mode
    times: tuple[tuple[int, float, float], ...]

    @property
    def length(self) -> float:
        return crossover(self.times)


@dataclass(frozen=True, kw_only=True)
class LiveCost:
    """Costs of a pair by one length and share of live rows; `cost` in the other way, `hidden` with hidden keys."""

    kernel: str
    other: str
    head_dim: int
    length: int
    share: float
    cost: float
    hidden: float | None


Item = Comparison | Speed | Crossing | LiveCost


def crossover(times: Sequence[tuple[int, float, float]]) -> float:
    """The tokens per document from which flash is faster, whatever the length, by (length, flash's ms, the other's ms).

    1 where it always is; the longest length where it is not even there: nothing is known of longer ones.
    """
    leads = [math.log(other / flash) for _, flash, other in times]  # above 0: flash is faster
    behind = [i for i, lead in enumerate(leads) if lead <= 0]
    if not behind:
        return 1.0
    last = behind[-1]
    if last + 1 == len(times):
        return float(times[last][0])
    share = -leads[last] / (leads[last + 1] - leads[last])
    shorter, longer = (math.log(times[i][0]) for i in (last, last + 1))
    return math.exp(shorter + share * (longer - shorter))


def pair_cost(ms: float, pairs: float, *, plain_ms: float, plain_pairs: float) -> float:
    """Of a pair of query and key, in units of one in plain two-pass flash; at least a thousandth, where noise says less."""
    return max(1e-3, (ms / pairs) / (plain_ms / plain_pairs))


def measure_kernel(send: Send, kernel_name: str, sizes: Sizes) -> None:
    """Send whether a flash kernel is right, and how fast it is."""
    for shape in sizes.shapes:
        compare_all(send, kernel_name, shape, sizes)
        send(measure_speed(kernel_name, shape, sizes))


def compare_in_fp16(send: Send, name: str, sizes: Sizes) -> None:
    """Send whether a backend is right in fp16, in which nothing is timed."""
    for shape in sizes.shapes:
        compare_all(send, name, replace(shape, dtype=torch.float16), sizes)


def measure_speed(kernel_name: str, shape: Shape, sizes: Sizes) -> Speed:
    backend = flash_backend(KERNELS[kernel_name], shape)
    times = [
        KernelTime(
            mode=mode,
            length=length,
            ms=round(op_milliseconds(backend, documents(mode, length, sizes.rows), shape), 4),
        )
        for length in sizes.timed_lengths
        for mode in MODES
    ]
    return Speed(kernel=kernel_name, head_dim=shape.head_dim, times=tuple(times))


def measure_beside(send: Send, kernel_name: str, other: str, sizes: Sizes) -> None:
    """Send everything that is to be known of a flash kernel beside the Triton kernels, or beside dense tiles.

    The most valuable first: whether those are right, then each shape's crossovers and costs.
    """
    for shape in sizes.shapes:
        compare_all(send, other, shape, sizes)
        for mode in MODES:
            send(measure_crossing(kernel_name, other, mode, shape, sizes))
        for item in measure_live(kernel_name, other, shape, sizes):
            send(item)


def compare_all(send: Send, name: str, shape: Shape, sizes: Sizes) -> None:
    """Send a `Comparison` for each case of a backend."""
    for case, plan, backend in checked_cases(name, shape, list(sizes.checked)):
        send(compare(name, case, backend, plan, shape))


def backends(kernel_name: str, other: str, shape: Shape) -> tuple[Backend, Backend]:
    """The flash kernel for every document, the other way for live rows; and the other way for all rows."""
    kernel = KERNELS[kernel_name]
    if other == TRITON:
        return beside_triton(kernel, shape, flash_from=1), beside_triton(kernel, shape, flash_from=math.inf)
    flash = flash_backend(kernel, shape)
    return flash, replace(flash, policy=replace(IN_TILES, flash_from=math.inf))


def measure_crossing(kernel_name: str, other: str, mode: Mode, shape: Shape, sizes: Sizes) -> Crossing:
    flash, rest = backends(kernel_name, other, shape)
    times: list[tuple[int, float, float]] = []
    for length in sizes.lengths:
        plan = documents(mode, length, sizes.rows)
        times.append((length, *(op_milliseconds(backend, plan, shape) for backend in (flash, rest))))
        if times[-1][2] > CLEAR_LEAD * times[-1][1]:
            break
    return Crossing(kernel=kernel_name, other=other, head_dim=shape.head_dim, mode=mode, times=tuple(times))


def measure_live(kernel_name: str, other: str, shape: Shape, sizes: Sizes) -> Iterator[LiveCost]:
    flash, _ = backends(kernel_name, other, shape)
    hides = can_hide_keys(flash.kernel, shape)
    hiding = replace(flash, policy=AS_HIDDEN_KEYS)
    for length in sizes.live_lengths:
        for share in sizes.live_shares:
            plan = documents("bidirectional", length, sizes.rows, share)
            kept, live = plan.num_kept / plan.num_documents, plan.num_live / plan.num_documents
            plain = build_plan("bidirectional", kept_lengths=plan.cu_seqlens.diff())
            plain_ms, live_ms = (op_milliseconds(flash, p, shape) for p in (plain, plan))
            unit = {"plain_ms": plain_ms, "plain_pairs": kept**2}
            hidden_ms = op_milliseconds(hiding, plan, shape) if hides else None
            yield LiveCost(
                kernel=kernel_name,
                other=other,
                head_dim=shape.head_dim,
                length=length,
                share=share,
                cost=pair_cost(live_ms - plain_ms, live * kept, **unit),
                hidden=None if hidden_ms is None else pair_cost(hidden_ms, (kept + live) ** 2, **unit),
            )


def describe(item: Item) -> str:
    if isinstance(item, Comparison):
        return describe_comparison(item)
    if isinstance(item, Speed):
        times = ", ".join(f"{time.length} {time.mode} {time.ms:.3g}" for time in item.times)
        return f"{item.kernel}, head dimension {item.head_dim}: {item.total_ms:.4g} ms (by tokens: {times})"
    place = f"{item.kernel} beside {item.other}, head dimension {item.head_dim}"
    if isinstance(item, Crossing):
        times = ", ".join(f"{n}: {flash:.3g} and {other:.3g}" for n, flash, other in item.times)
        return f"{place}, {item.mode}: faster from {item.length:.0f} tokens (ms by length: {times})"
    hidden = "" if item.hidden is None else f", as hidden keys {item.hidden:.3g}"
    return f"{place}, {item.share:.0%} live of {item.length} tokens: a live row's pair costs {item.cost:.3g}{hidden}"


def run_all(sizes: Sizes, deadline: float, findings: Findings) -> list[Item]:
    """What is found of every flash kernel, alone and beside each other way, printed as it comes."""
    found: list[Item] = []

    def collect(what: str, work: Callable[..., None], *arguments: object) -> None:
        for item in each_alone(work, *arguments, sizes, deadline=deadline):
            if isinstance(item, Ended):
                add_end(findings, what, item)
                continue
            found.append(item)
            print(f"  {describe(item)}", flush=True)

    names = list(flash_kernels(sizes.shapes[0]))
    for kernel in names:
        collect(kernel, measure_kernel, kernel)
    fastest_first = by_speed(names, found, sizes.shapes[0])
    for other in (TRITON, TILES):
        refused = refusal(other, sizes.shapes[0])
        for kernel in fastest_first:
            if refused is not None:
                findings.add_note(f"{kernel} beside {other}: not measured, {other} {refused}")
                continue
            collect(f"{kernel} beside {other}", measure_beside, kernel, other)
        for name in (*(names if other == TRITON else ()), *([other] if refused is None else ())):
            collect(f"{name} in fp16", compare_in_fp16, name)
    return found


def by_speed(names: Sequence[str], found: Sequence[Item], shape: Shape) -> list[str]:
    """The fastest first, at the shape's head dimension; those that were not timed last."""
    speeds = [item for item in found if isinstance(item, Speed) and item.head_dim == shape.head_dim]
    total = {item.kernel: item.total_ms for item in speeds}
    return sorted(names, key=lambda name: total.get(name, math.inf))


def assemble(found: Sequence[Item], capability: tuple[int, int], *, rehearsal: bool) -> MeasuredPolicy:
    """The content of the file."""
    comparisons = dict.fromkeys(item for item in found if isinstance(item, Comparison))
    measured = dict.fromkeys(
        (item.kernel, item.head_dim) for item in found if not isinstance(item, Comparison)
    )
    return MeasuredPolicy(
        rehearsal=rehearsal,
        capability=capability,
        gpu="none: a rehearsal on a CPU" if rehearsal else torch.cuda.get_device_name(),
        date=datetime.date.today().isoformat(),
        driver="none" if rehearsal else driver_version() or "unknown",
        versions=running_versions(),
        measurements=tuple(measurement(*key, found) for key in measured),
        comparisons=tuple(comparisons),
    )


def measurement(kernel: str, head_dim: int, found: Sequence[Item]) -> Measurement:
    """What the items say of one flash kernel at one head dimension."""
    others = (item for item in found if not isinstance(item, Comparison))
    own = [item for item in others if (item.kernel, item.head_dim) == (kernel, head_dim)]
    live = [item for item in own if isinstance(item, LiveCost)]
    hidden = [c.hidden for c in live if c.hidden is not None]

    def beside(other: str) -> Alternative | None:
        crossings = (c for c in own if isinstance(c, Crossing) and c.other == other)
        lengths = {c.mode: round(c.length, 1) for c in crossings}
        pairs = [c.cost for c in live if c.other == other]
        if set(lengths) != set(MODES) or not pairs:
            return None
        return Alternative(
            flash_from=lengths["bidirectional"],
            causal_flash_from=lengths["causal"],
            live_cost=round(statistics.median(pairs), 3),
        )

    return Measurement(
        kernel=kernel,
        head_dim=head_dim,
        times=next((item.times for item in own if isinstance(item, Speed)), ()),
        hidden_cost=round(statistics.median(hidden), 3) if hidden else None,
        tiles=beside(TILES),
        triton=beside(TRITON),
    )


def add_tables(policy: MeasuredPolicy, found: Sequence[Item], findings: Findings) -> None:
    speeds = [item for item in found if isinstance(item, Speed)]
    rows = [
        [s.kernel, s.head_dim, time.mode, time.length, f"{time.ms:.4g}"] for s in speeds for time in s.times
    ]
    columns = ["flash kernel", "head dimension", "mode", "tokens", "ms"]
    findings.add_table("Flash kernels, forward and backward", columns, rows)
    crossings = [item for item in found if isinstance(item, Crossing)]
    rows = [
        [c.kernel, c.other, c.head_dim, c.mode, n, f"{flash:.4g}", f"{other:.4g}", f"{other / flash:.3g}"]
        for c in crossings
        for n, flash, other in c.times
    ]
    columns = ["flash kernel", "beside", "head dimension", "mode", "tokens", "its ms", "ms", "its lead"]
    findings.add_table(
        "A flash kernel beside what would serve short documents, forward and backward", columns, rows
    )
    rows = [
        [m.kernel, m.head_dim, name, a.flash_from, a.causal_flash_from, a.live_cost, m.hidden_cost]
        for m in policy.measurements
        for name, a in ((TRITON, m.triton), (TILES, m.tiles))
        if a is not None
    ]
    columns = [
        "flash kernel",
        "head dimension",
        "beside",
        "faster from",
        "causal",
        "live cost",
        "hidden cost",
    ]
    findings.add_table("The policy", columns, rows)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="default runs/gpu_policy/sm_XY.json, by the GPU"
    )
    add_bench_options(parser, seconds=50)


def measure_policy(options: Namespace) -> int:
    prepare(rehearse=options.rehearse)
    capability = (0, 0) if options.rehearse else torch.cuda.get_device_capability()
    name = file_name(capability)
    file = options.out or Path("runs/gpu_policy", name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write '{file}': {error.strerror}") from None
    sizes, findings = ON_CPU if options.rehearse else ON_GPU, Findings()
    found = run_all(sizes, time.monotonic() + options.seconds, findings)
    for item in found:
        if isinstance(item, Comparison) and not item.is_right:
            findings.add_wrong(describe(item))
    policy = assemble(found, capability, rehearsal=options.rehearse)
    write_atomically(file, encode(policy))
    add_tables(policy, found, findings)
    home = f"bico_ds/attention/measured/{name}"
    use = "`auto` reads no rehearsal" if options.rehearse else f"copy it to {home}, where `auto` reads it"
    findings.add_note(f"written to {file}: {use}")
    return findings.finish(as_json=options.json)


main = Command(description=__doc__, add_options=add_options, run=measure_policy)


if __name__ == "__main__":
    main.start()
