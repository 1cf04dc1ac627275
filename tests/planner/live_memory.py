"""Bytes of the tensors that are alive while a model runs, on any device, the meta device too."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Made:
    """A storage: its bytes, and the shape and operation of the tensor that it was made for."""

    bytes: int
    shape: tuple[int, ...]
    made_by: str


class LiveMemory(TorchDispatchMode):
    """Inside, every storage that an operation makes counts from then until nothing refers to it.

    What a kernel allocates and frees within one operation is not seen. `ignored`: elements of storages that do not count,
    as those of weights' gradients, which have the sizes of the weights.
    """

    def __init__(self, ignored: Collection[int] = ()) -> None:
        super().__init__()
        self._ignored = set(ignored)
        self.alive: dict[int, Made] = {}
        self.bytes = 0
        self.peak = 0
        self.alive_at_peak: tuple[Made, ...] = ()

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.alive_at_peak = self.bytes, tuple(self.alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() not in self._ignored:
                self._count(tensor, str(func))
        return out

    def _count(self, tensor: Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = Made(storage.nbytes(), tuple(tensor.shape), made_by)
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self.bytes > self.peak:
            self.restart()

    def _forget(self, key: int) -> None:
        self.bytes -= self.alive.pop(key).bytes
