"""BICO without its reversed rotation: keys behind a query take the forward one, too (`imports:` of a recipe).

To see what the rotation is for. It breaks the oracle, and no other attention backend runs beside it.
"""

from __future__ import annotations

from typing import Any

import torch

from bico_ds.attention import oracle
from bico_ds.attention.backend import Backend

_dense_attention = oracle.dense_attention


def _without_flip(*args: torch.Tensor, position: torch.Tensor, causal: bool, **settings: Any) -> torch.Tensor:
    """No key is behind a query where all positions are equal; in causal mode the order is also the mask."""
    position = position if causal else torch.zeros_like(position)
    return _dense_attention(*args, position=position, causal=causal, **settings)


def _refuse(*args: Any) -> Any:
    raise RuntimeError("no_flip.py breaks the oracle alone: set model.attention_backend=oracle")


oracle.dense_attention = _without_flip
Backend.forward = _refuse  # type: ignore[assignment, method-assign]
