"""What the operations of a step are and move, counted on any device, the meta device too: launches, bytes, products.

A launch reads each input once and writes each result once, of an indexed tensor the rows that are taken; a broadcast
dimension counts once, and a view is no launch. Ops of ours that state their traffic (`bico_ds/common/traffic.py`) count
as they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bico_ds.common.traffic import Traffic, hearing_traffic

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
FLASH = ("_flash_attention_forward", "_flash_attention_backward")
_NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "promote_types")
_ROWS_TAKEN = ("embedding", "index_select", "gather", "index")
_FILLED = (
    "zeros",
    "new_zeros",
    "zeros_like",
    "zero_",
    "fill_",
    "full",
    "new_full",
    "full_like",
    "ones",
    "arange",
)
_ROWS_ADDED = ("index_add_", "scatter_add_")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of operations: bytes, and `flops` of matrix products (a multiplication and an addition are two)."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            launches=self.launches + other.launches,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            flops=self.flops + other.flops,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            launches=self.launches - other.launches,
            bytes_read=self.bytes_read - other.bytes_read,
            bytes_written=self.bytes_written - other.bytes_written,
            flops=self.flops - other.flops,
        )


class Operations(TorchDispatchMode):
    """Within, every operation is counted: `costs` by group and name. `group` says to which one of that name belongs."""

    def __init__(self, group: Callable[[str], str] = lambda name: "all") -> None:
        super().__init__()
        self._group = group
        self.costs: dict[tuple[str, str], Cost] = {}
        self._heard = 0  # calls that stated their traffic

    def total(self, *groups: str, without: tuple[str, ...] = ()) -> Cost:
        """Of these groups, or of all; without operations of those names."""
        found = [
            cost
            for (group, name), cost in self.costs.items()
            if (not groups or group in groups) and name not in without
        ]
        return sum(found, Cost())

    def __enter__(self) -> Self:
        self._hearing = hearing_traffic(self._hear)
        self._hearing.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hearing.__exit__(*exception)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, heard = kwargs or {}, self._heard
        result = op(*args, **kwargs)
        name = op._schema.name.split("::")[1]
        if self._heard == heard and _is_launch(op, name):
            self._add(name, _cost(op, name, args, kwargs, result))
        return result

    def _hear(self, call: Traffic) -> None:
        self._heard += 1
        cost = Cost(launches=call.launches, bytes_read=call.bytes_read, bytes_written=call.bytes_written)
        self._add(call.op, cost)

    def _add(self, name: str, cost: Cost) -> None:
        key = self._group(name), name
        self.costs[key] = self.costs.get(key, Cost()) + cost


def _is_launch(op: Any, name: str) -> bool:
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return not is_view and not name.startswith(_NO_LAUNCH)


def _cost(op: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> Cost:
    read, written = _moved(name, args, kwargs, result)
    return Cost(
        launches=1, bytes_read=read, bytes_written=written, flops=_flops(op, name, args, kwargs, result)
    )


def _flops(op: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    if name not in PRODUCTS:
        return 0
    if name in ("addmm_", "baddbmm"):
        return int(2 * result.numel() * args[1].shape[-1])
    return int(flop_registry[op.overloadpacket](*args, **kwargs, out_val=result))


def _moved(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """Bytes read and written."""
    written = _sizes(result)
    if name in _ROWS_TAKEN:
        return written, written
    if name in _FILLED:
        return 0, written
    if name == "copy_":
        return _size(args[1]), _size(args[0])
    if name == "index_copy_":
        return _size(args[3]), _size(args[3])
    if name in _ROWS_ADDED:
        return 2 * _size(args[3]), _size(args[3])
    if name == "embedding_dense_backward":  # zeroes all rows, and adds to those that there are
        return 2 * _size(args[0]), written + _size(args[0])
    given = {key: value for key, value in kwargs.items() if key != "out"}
    return _sizes((args, given)), written


def _sizes(tree: Any) -> int:
    return sum(_size(x) for x in tree_leaves(tree) if isinstance(x, Tensor))


def _size(x: Tensor) -> int:
    """Bytes, a broadcast dimension counted once."""
    lengths = [n for n, step in zip(x.shape, x.stride(), strict=True) if step]
    return x.element_size() * int(np.prod(lengths, dtype=np.int64))
