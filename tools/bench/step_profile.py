"""What a step is made of: its costliest kernels, the shares of groups of work, and where the host waits for the GPU.

Work belongs to the group of what launched it, not of its kernel's name: a matrix product may be the head's or a layer's.
On a CPU the same by each operation's own time, so that all of it is rehearsed there.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

OPTIMIZER_PHASE = "bench: optimizer step"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear"}
COPIES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::cat"}
OTHER, UNKNOWN = "norms, elementwise and the rest", "launched by nothing that was recorded"
# By the beginning of a name, on the way from an operation to its callers; the first that fits counts.
GROUPS = (
    ("optimizer", (OPTIMIZER_PHASE,)),
    ("head and loss", ("_ChunkedCrossEntropy",)),
    ("attention", ("_PackedAttention", "aten::scaled_dot_product", "aten::_scaled_dot_product", "bico_ds::")),
    ("communication", ("nccl:", "gloo:", "c10d::", "record_param_comms")),
)
HOST_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
SYNC_WARNING = "called a synchronizing CUDA operation"


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Of one step, in milliseconds. `kernels`: (name, ms, calls) of all, the costliest first; `groups`: of the same time.

    `waits`: (call of CUDA's runtime, ms, calls) in which the host waited.
    """

    kernels: list[tuple[str, float, int]]
    groups: dict[str, float]
    waits: list[tuple[str, float, int]]

    @property
    def total_ms(self) -> float:
        return sum(ms for _, ms, _ in self.kernels)

    def kernel_rows(self, most: int) -> list[list[Any]]:
        """[share, ms, calls, name] of the costliest."""
        return [
            [f"{ms / self.total_ms:.1%}", round(ms, 3), calls, name[:100]]
            for name, ms, calls in self.kernels[:most]
        ]

    def group_shares(self) -> dict[str, float]:
        """The share of each group, the largest first."""
        return {
            name: round(ms / self.total_ms, 4)
            for name, ms in sorted(self.groups.items(), key=lambda item: -item[1])
        }


def profile_step(step: Callable[[], object], *, on_cuda: bool) -> StepProfile | None:
    """Profile one step; None where the profiler saw no kernel."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    return summarize(profile.events(), on_cuda=on_cuda)


def summarize(events: Any, *, on_cuda: bool) -> StepProfile | None:
    """Of the profiler's events, an `EventList`."""
    launches = list(_launches(events, on_cuda=on_cuda))
    groups: dict[str, float] = collections.defaultdict(float)
    for name, ms, caller in launches:
        groups[group_of(name, caller)] += ms
    kernels = _totals((name, ms) for name, ms, _ in launches)
    if on_cuda:
        kernels = _totals((event.name, event.time_range.elapsed_us() / 1e3) for event in _kernels(events))
        orphaned = sum(ms for _, ms, _ in kernels) - sum(groups.values())
        if orphaned > 0.001 * sum(groups.values()):
            groups[UNKNOWN] = orphaned
    waits = _totals((event.name, event.cpu_time_total / 1e3) for event in events if event.name in HOST_WAITS)
    return StepProfile(kernels=kernels, groups=dict(groups), waits=waits) if kernels else None


def _kernels(events: Any) -> Iterator[Any]:
    """What ran on the GPU: kernels, copies and fills, without the spans of `record_function`."""
    return (
        event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )


def _launches(events: Any, *, on_cuda: bool) -> Iterator[tuple[str, float, Any]]:
    """(name, ms, the operation that launched it) of each kernel; on a CPU each operation with its own time."""
    spans = {event.name for event in events if event.is_user_annotation}
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_async:
            continue
        if not on_cuda:
            yield event.name, event.self_cpu_time_total / 1e3, event
            continue
        for kernel in event.kernels:
            if kernel.name not in spans:
                yield kernel.name, kernel.duration / 1e3, event


def group_of(kernel: str, caller: Any) -> str:
    """The group of a kernel by the operations around its launch."""
    callers = []
    while caller is not None:
        callers.append(caller.name)
        caller = caller.cpu_parent
    for group, beginnings in GROUPS:
        if any(name.startswith(beginnings) for name in callers):
            return group
    if PRODUCTS.intersection(callers):
        return "products of the layers"
    if kernel.startswith(("Memcpy", "Memset")) or COPIES.intersection(callers[:1]):
        return "copies and fills"
    return OTHER


def _totals(named: Iterator[tuple[str, float]]) -> list[tuple[str, float, int]]:
    """(name, sum, count) by name, the largest sum first."""
    sums: dict[str, tuple[float, int]] = {}
    for name, ms in named:
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + ms, count + 1)
    return sorted(((name, *sums[name]) for name in sums), key=lambda entry: -entry[1])


def optimizer_phase() -> record_function:
    """A span around the optimizer step, by which `group_of` knows its work."""
    return record_function(OPTIMIZER_PHASE)


def host_waits(step: Callable[[], object]) -> dict[str, int]:
    """Places at which the host waited for the GPU, and how often, by torch's warnings: most of them first.

    Torch does not warn of `torch.cuda.synchronize`, of events, and of copies from pageable memory.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return count_waits(found)


def count_waits(found: list[warnings.WarningMessage]) -> dict[str, int]:
    """How often torch warned of a wait, by place."""
    seen = collections.Counter(
        f"{warning.filename.split('site-packages/')[-1]}:{warning.lineno}"
        for warning in found
        if SYNC_WARNING in str(warning.message)
    )
    return dict(seen.most_common(12))
