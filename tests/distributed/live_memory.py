"""Bytes of all tensors of a process, by torch's own allocator events, while blocks of code run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed
from torch.profiler import ProfilerActivity, profile, record_function

_BLOCK = "block "
_COLLECTIVES = (
    "allreduce",
    "reduce",
    "broadcast",
    "barrier",
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
)
# The thread of a collective lets go of its tensors after the waiting thread goes on, and what it frees is not recorded.
_PAUSE_SECONDS = 0.003


@dataclass(frozen=True, kw_only=True)
class Block:
    """Live bytes when a block began, and the most while it ran."""

    before: int
    most: int


class LiveMemory:
    """The blocks that ran within `recorded`, by name; of those with one name, in their order."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[Block]] = {}

    @contextmanager
    def recorded(self) -> Iterator[LiveMemory]:
        """Tensors of before are not seen: the model must be built within."""
        with _patient_collectives(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            yield self
        self._read(found.profiler.kineto_results.events())

    def block(self, name: str) -> record_function:
        gc.collect()  # cycles of the model's construction would be freed at some later time
        return record_function(_BLOCK + name)

    def _read(self, events: Any) -> None:
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        times, live = np.array([at for at, _ in changes]), np.cumsum([size for _, size in changes])
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name().startswith(_BLOCK):
                begin, end = np.searchsorted(
                    times, [event.start_ns(), event.start_ns() + event.duration_ns()]
                )
                block = Block(before=int(live[begin - 1]), most=int(live[max(begin - 1, 0) : end].max()))
                self.blocks.setdefault(event.name().removeprefix(_BLOCK), []).append(block)


@contextmanager
def _patient_collectives() -> Iterator[None]:
    """Collectives that are over, and whose thread has let go, when they return."""
    group = torch.distributed.ProcessGroup
    originals = {name: getattr(group, name) for name in _COLLECTIVES}

    def patient(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            work = original(*arguments, **options)
            work.wait()
            time.sleep(_PAUSE_SECONDS)
            return work

        return call

    for name, original in originals.items():
        setattr(group, name, patient(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(group, name, original)
