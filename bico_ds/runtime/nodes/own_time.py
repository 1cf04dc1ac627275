"""How long this rank itself works in a step, without its waiting for the others: what tells a slow rank in lock-step."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch.distributed import Work


class _Moment(Protocol):
    """A moment of the host or of the device's stream."""

    def seconds_until(self, later: Any) -> float: ...


class _HostMoment:
    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_until(self, later: _HostMoment) -> float:
        return later._time - self._time


class _DeviceMoment:
    """On the stream that computes; read when the device has passed it."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def seconds_until(self, later: _DeviceMoment) -> float:
        return self._event.elapsed_time(later._event) / 1000


class OwnTime:
    """Measures, between `begin` and `end`, the seconds in which this rank did not wait for a collective to be over.

    On a CPU these are the host's. On a GPU they are those of the stream that computes: its waiting for other streams'
    collectives is taken out by events around it, and what its host has it wait for (data, above all) is left in; neither
    makes the host wait. Collectives on the computing stream itself count as work. So far run over gloo only.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if self._on_cuda else None
        self._started: _Moment | None = None
        self._ended: _Moment | None = None
        self._waits: list[tuple[_Moment, _Moment]] = []
        self._counted: list[tuple[_Moment, _Moment]] = []  # those until `_ended`
        self._original: Any = None
        self._last = 0.0

    def __enter__(self) -> None:
        """Note waits for collectives in this block: every one of torch's ends in `Work.wait`."""
        self._original = original = Work.wait

        def noted(work: Work, *arguments: Any, **options: Any) -> Any:
            if self._stream is not None and torch.cuda.current_stream() != self._stream:
                return original(work, *arguments, **options)
            before = self._now()
            result = original(work, *arguments, **options)
            self._waits.append((before, self._now()))
            return result

        Work.wait = noted  # type: ignore[method-assign,assignment]

    def __exit__(self, *raised: object) -> None:
        Work.wait = self._original  # type: ignore[method-assign]

    def begin(self) -> None:
        """The ranks are together: a vector of all was just read from the device."""
        if self._on_cuda and self._ended is not None:
            self._last = self._seconds(self._ended)
        self._waits, self._ended, self._started = [], None, self._now()

    def end(self) -> float:
        """Seconds of this rank's own since `begin`; on a GPU those of the time before, which alone can be read by now."""
        if self._started is None:
            return 0.0
        self._ended, self._counted, self._waits = self._now(), self._waits, []
        return self._last if self._on_cuda else self._seconds(self._ended)

    def _now(self) -> _Moment:
        return _DeviceMoment() if self._on_cuda else _HostMoment()

    def _seconds(self, ended: _Moment) -> float:
        assert self._started is not None
        waited = sum(before.seconds_until(after) for before, after in self._counted)
        return max(self._started.seconds_until(ended) - waited, 0.0)
