"""Random weights that depend on the seed and a parameter's name only: never on world size or rank."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class RandomWeights:
    """normal(0, `std`) for matrices, 1 for norms, 0 for biases: as transformers initialises the `FAMILIES`."""

    def __init__(self, *, seed: int, std: float) -> None:
        self._seed = seed
        self._std = std

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`, fp32."""
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith(".bias"):
            return torch.zeros(stop - start)
        generator = named_generator(self._seed, name)
        return torch.empty(shape.numel()).normal_(0.0, self._std, generator=generator)[start:stop]


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by `seed` and the parameter's name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
