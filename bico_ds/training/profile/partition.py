"""The seconds of a step by its parts, from the events of torch's profiler: every moment of the step has one part.

On a CPU each moment of the training thread belongs to the innermost event that runs (`names.py`), and what Python does
between two events to the one that it leads to. On a GPU the moments are
those of the stream that computes: a kernel belongs to what launched it. Where that stream stands still, communication on
another one is what nothing hides; else the device waits for the host, which may be waiting for data, or make the update
itself. No torch here.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bico_ds.planner.report.step_parts import StepPart
from bico_ds.training.profile.names import STEP, Place, inside

Event = dict[str, Any]
"""Of a Chrome trace, with times in microseconds."""

_LAUNCHES = ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation", *_LAUNCHES)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_COLLECTIVE = "nccl"
# What the host does while the device waits for it, where that is the reason.
_REASONS = (StepPart.DATA, StepPart.OPTIMIZER)


class _Stretch(NamedTuple):
    """From `start` to `end` one part of the step was at work."""

    start: float
    end: float
    part: StepPart


def seconds_by_part(events: Sequence[Event], *, on_cuda: bool) -> dict[StepPart, float]:
    """Seconds of each part of the one step that the events of a Chrome trace hold; their sum is the step's.

    Raises `ValueError` where no step is among them, or `on_cuda` no work of the GPU.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    step = next((event for event in complete if _is_step(event)), None)
    if step is None:
        raise ValueError("the profiler has recorded no step")
    start, end = step["ts"], step["ts"] + step["dur"]
    launched: dict[int, StepPart] = {}
    threads = _threads(complete, start, end)
    stretches = {thread: list(_host_stretches(of_thread, launched)) for thread, of_thread in threads.items()}
    found = stretches[step["tid"]]
    if on_cuda:
        kernels = [event for event in complete if event.get("cat") in _DEVICE]
        if not kernels:
            raise ValueError("the profiler has recorded no work of the GPU; another profiler may hold it")
        found = list(_device_stretches(kernels, launched, found))
    else:
        found = _to_the_next([stretch for stretch in found if stretch.start < stretch.end])
    seconds: dict[StepPart, float] = defaultdict(float)
    for stretch in found:
        seconds[stretch.part] += (stretch.end - stretch.start) / 1e6
    return dict(seconds)


def _is_step(event: Event) -> bool:
    """On the host: a GPU has an event of that name of its own."""
    return event.get("cat") == "user_annotation" and event["name"].startswith(STEP)


def _threads(events: Iterable[Event], start: float, end: float) -> dict[Any, list[Event]]:
    """What the host did in the step, by thread and in order; of events that begin together the outer one first."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _HOST and start <= event["ts"] < end:
            threads[event["tid"]].append(event)
    for of_thread in threads.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"], not _is_step(event)))
    return threads


def _host_stretches(events: Sequence[Event], launched: dict[int, StepPart]) -> Iterator[_Stretch]:
    """The moments of a thread, each by the innermost event that runs; adds to `launched` the part of each launch."""
    running: list[tuple[float, Place]] = []  # each with its end, the innermost last
    at = 0.0
    for event in [*events, {"ts": float("inf"), "dur": 0.0, "name": ""}]:
        while running and running[-1][0] <= event["ts"]:
            end, place = running.pop()
            yield _Stretch(at, end, place.part)
            at = end
        end, place = running[-1] if running else (float("inf"), Place())
        if running:
            yield _Stretch(at, event["ts"], place.part)
        at, place = event["ts"], inside(place, event["name"])
        running.append((min(event["ts"] + event["dur"], end), place))  # the clock's digits may overlap
        if event.get("cat") in _LAUNCHES:
            launched[event["args"]["correlation"]] = place.part


def _to_the_next(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """In order, with those of no name given to the first that follows and has one."""
    found, following = [], StepPart.OTHER
    for stretch in reversed(stretches):
        following = following if stretch.part is StepPart.OTHER else stretch.part
        found.append(stretch._replace(part=following))
    return found[::-1]


def _device_stretches(
    kernels: Sequence[Event], launched: dict[int, StepPart], host: Sequence[_Stretch]
) -> Iterator[_Stretch]:
    """The moments of the stream that computes, from the first of `host` to the last."""
    streams: dict[int, list[_Stretch]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        is_collective = kernel["name"].startswith(_COLLECTIVE)
        known = launched.get(kernel["args"].get("correlation"), StepPart.OTHER)
        part = StepPart.COMMUNICATION if is_collective else known
        streams[kernel["args"]["stream"]].append(_Stretch(kernel["ts"], kernel["ts"] + kernel["dur"], part))
    computing = max(streams, key=lambda stream: _computed(streams[stream]))
    besides = [
        stretch
        for stream in streams.keys() - {computing}
        for stretch in streams[stream]
        if stretch.part is StepPart.COMMUNICATION
    ]
    reasons = [stretch for stretch in host if stretch.part in _REASONS]
    start, end = host[0].start, host[-1].end
    found = _in_a_row(streams[computing])
    for lower in (besides, reasons, [_Stretch(start, end, StepPart.HOST_WAITS)]):
        found = _laid_over(found, _in_a_row(lower))
    for stretch in found:
        if stretch.end > start and stretch.start < end:
            yield _Stretch(max(stretch.start, start), min(stretch.end, end), stretch.part)


def _computed(stream: Sequence[_Stretch]) -> float:
    return sum(
        stretch.end - stretch.start for stretch in stream if stretch.part is not StepPart.COMMUNICATION
    )


def _in_a_row(stretches: Iterable[_Stretch]) -> list[_Stretch]:
    """In order, each from where the ones before it end."""
    found: list[_Stretch] = []
    at = float("-inf")
    for stretch in sorted(stretches, key=lambda one: one.start):
        if stretch.end > at:
            found.append(stretch._replace(start=max(stretch.start, at)))
            at = stretch.end
    return found


def _laid_over(upper: list[_Stretch], lower: list[_Stretch]) -> list[_Stretch]:
    """All of `upper`, and of `lower` what is where `upper` is not; both in a row, as is what is returned."""
    begins = [float("-inf"), *(stretch.end for stretch in upper)]
    ends = [*(stretch.start for stretch in upper), float("inf")]
    found = list(upper)
    for stretch in lower:
        gap = bisect.bisect_right(begins, stretch.start) - 1
        while gap < len(begins) and begins[gap] < stretch.end:
            start, end = max(stretch.start, begins[gap]), min(stretch.end, ends[gap])
            if start < end:
                found.append(_Stretch(start, end, stretch.part))
            gap += 1
    return sorted(found, key=lambda one: one.start)
