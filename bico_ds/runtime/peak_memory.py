"""The memory that a process has, and the most that it has taken, as a running training can know it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bico_ds.runtime import host_memory


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Of one process, in bytes. `host`: its resident memory, mapped files among it; the others as `PeakMemory` counts.

    `allocated`: what tensors take now; `peak`: the most that they took; `reserved`: what is taken from the device for them.
    """

    allocated: int
    reserved: int
    peak: int
    host: int


class PeakMemory:
    """Of this process on its `device`, in bytes, since it was made; `note` is to be called after every step.

    On CUDA the caching allocator keeps its own peak: `allocated` is what tensors took, `reserved` what it took from the
    device for them. On a CPU both are the growth of anonymous memory: pages that a step freed stay with the process
    (`host_memory.keep_freed_pages`), so what is there after a step is about the step's own peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._level = self._highest = 0 if device.type == "cuda" else host_memory.anonymous_bytes()

    def note(self) -> None:
        if self._device.type == "cpu":
            self._highest = max(self._highest, host_memory.anonymous_bytes())

    @property
    def allocated(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._highest - self._level

    @property
    def reserved(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self.allocated

    def now(self) -> MemoryUse:
        """What this process has at this moment; the host does not wait for the device."""
        host, shared = host_memory.resident_and_shared()
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats(self._device)
            allocated, reserved = (
                stats.get(f"{what}_bytes.all.current", 0) for what in ("allocated", "reserved")
            )
            return MemoryUse(allocated=allocated, reserved=reserved, peak=self.allocated, host=host)
        self._highest = max(self._highest, host - shared)
        grown = max(host - shared - self._level, 0)
        return MemoryUse(allocated=grown, reserved=grown, peak=self.allocated, host=host)
