"""Watches a model on the meta device for what would stop a GPU: waits of the host, copies, tensors that lie elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Their result's shape or value depends on what a tensor holds, which only the device knows.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# They copy the host's numbers from pageable memory, for which it waits; on the meta device they dispatch nothing.
COPIES = ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor"))


@contextmanager
def no_host_work() -> Iterator[None]:
    """Inside, an `AssertionError` for every operation on the host, and every one for which it waits for the device."""
    with _no_copies(), _NoWaits():
        yield


@contextmanager
def _no_copies() -> Iterator[None]:
    """Not by a `TorchFunctionMode`: torch leaves that before it begins a backward pass."""
    with ExitStack() as stack:
        for owner, name in COPIES:
            stack.enter_context(
                patch.object(owner, name, side_effect=AssertionError(f"{name}: a copy of the host's numbers"))
            )
        yield


class _NoWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not _waits(func, args), f"{func}: the host waits for the device"
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # One without elements is no work: torch 2.11's checkpoint makes some.
        elsewhere = [x for x in tensors if not x.is_meta and x.numel()]
        assert not elsewhere, (
            f"{func}: {elsewhere[0].dtype} {tuple(elsewhere[0].shape)} on {elsewhere[0].device}"
        )
        return out


def _waits(func: Any, args: Any) -> bool:
    if func in INDEXING:  # torch tags them all, but only masks of bool are searched for their rows
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(WAITS & set(func.tags))


@contextmanager
def checked_gradients(functions: list[type[torch.autograd.Function]]) -> Iterator[Counter[str]]:
    """Inside, each gradient that these functions return must have its input's dtype and shape; yields how often they ran.

    Autograd itself would cast it, at the cost of a pass over memory.
    """
    ran: Counter[str] = Counter()
    plain = [(function, function.forward, function.backward) for function in functions]
    for function, forward, backward in plain:
        function.forward = staticmethod(_noting(function, forward, ran))
        function.backward = staticmethod(_checking(function, backward, ran))
    try:
        yield ran
    finally:
        for function, forward, backward in plain:
            function.forward, function.backward = staticmethod(forward), staticmethod(backward)


def _noting(function: type, forward: Any, ran: Counter[str]) -> Any:
    def noting(ctx: Any, *inputs: Any) -> Any:
        ran[f"{function.__name__}.forward"] += 1
        ctx.noted = [(x.dtype, x.shape) if isinstance(x, Tensor) else None for x in inputs]
        return forward(ctx, *inputs)

    return noting


def _checking(function: type, backward: Any, ran: Counter[str]) -> Any:
    def checking(ctx: Any, *grads: Any) -> Any:
        found = backward(ctx, *grads)
        ran[f"{function.__name__}.backward"] += 1
        for grad, noted in zip(found, ctx.noted, strict=True):
            assert grad is None or (grad.dtype, grad.shape) == noted, f"{function}: {grad.dtype}, not {noted}"
        return found

    return checking
