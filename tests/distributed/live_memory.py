"""Bytes of all tensors of a process, counted by an allocator of our own in the place of torch's."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile the allocator, once for all ranks."""
    library, torch_folder = folder / "live_memory.so", Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    linked = [f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run([compiler, *options, str(_SOURCE), "-o", str(library), *linked], check=True)
    return library


@dataclass(frozen=True, kw_only=True)
class Block:
    """Live bytes when a block of code began, and the most while it ran."""

    before: int
    most: int


class LiveMemory:
    """The blocks that ran, by name; of those with one name, in their order. Tensors of before are not seen."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.live_bytes.restype = self._library.most_bytes.restype = ctypes.c_size_t
        self._library.count_from_here()
        self.restart()

    def restart(self) -> None:
        """Forget the blocks, and count tensors from here on."""
        gc.collect()
        gc.freeze()  # of a million objects of imports: each further collection would walk all of them
        self._start = self._library.live_bytes()
        self.blocks: dict[str, list[Block]] = {}

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, tensors of this thread are not seen."""
        self._library.count(False)
        try:
            yield
        finally:
            self._library.count(True)

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        gc.collect()  # cycles of the model's construction would be freed at some later time
        before = self._library.live_bytes()
        self._library.most_bytes()
        yield
        most = self._library.most_bytes()
        self.blocks.setdefault(name, []).append(Block(before=before - self._start, most=most - self._start))
