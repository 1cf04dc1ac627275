"""Random inputs are fresh in every call of pytest, and `BICO_DS_SEED` brings those of a failure back."""

from __future__ import annotations

import os
import random
import secrets
import zlib
from typing import Any

import numpy as np
import torch

# In the environment, so that the workers of one call draw from one seed.
SEED = int(os.environ.setdefault("BICO_DS_SEED", str(secrets.randbits(32))))

_default_rng = np.random.default_rng


def draw_for(name: str) -> None:
    """Seed every generator that has no seed of its own, by `SEED` and the name of a test, whatever ran before it."""
    stream = np.random.SeedSequence([SEED, zlib.crc32(name.encode())])
    torch_seed, random_seed = map(int, stream.generate_state(2))
    torch.manual_seed(torch_seed)
    random.seed(random_seed)

    def default_rng(seed: Any = None) -> np.random.Generator:
        return _default_rng(stream.spawn(1)[0] if seed is None else seed)

    np.random.default_rng = default_rng
