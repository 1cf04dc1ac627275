"""Bytes of the tensors that are alive while a model runs, on any device, the meta device too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside, every storage that an operation makes counts from then until nothing refers to it.

    What a kernel allocates and frees within one operation is not seen. `weights`, and tensors of their shapes, as their
    gradients are, do not count. `read`: tensors of before, which do count.
    """

    def __init__(self, weights: Iterable[Tensor], read: Iterable[Tensor] = ()) -> None:
        super().__init__()
        held = tuple(weights)
        shapes = {tuple(weight.shape) for weight in held}
        self._shapes = shapes | {shape[::-1] for shape in shapes}
        self._alive: dict[int, int] = {}
        self.bytes = 0
        self.peak = 0
        for tensor in (*held, *read):
            self._count(tensor)

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = 0 if tuple(tensor.shape) in self._shapes else storage.nbytes()
        self.bytes += self._alive[key]
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)
