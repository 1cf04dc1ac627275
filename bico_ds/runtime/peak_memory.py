"""The most memory that a process has taken, as a running training can know it."""

from __future__ import annotations

import torch

from bico_ds.runtime import host_memory


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
