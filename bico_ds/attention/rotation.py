"""Rotary embedding in both directions at once, and the way back for gradients.

Convention of Hugging Face's `apply_rotary_pos_emb`: with `x = [x1, x2]` in halves,
`R_m x = [x1·c1 - x2·s1, x2·c2 + x1·s2]`. The reversed rotation `R_-m` negates every sine (BICO, arXiv 2311.07468,
section 3.2). Tables may carry a scaling factor (YaRN), so nothing here assumes `c² + s² = 1`.

All functions take x [..., D] and tables that broadcast to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bico_ds.named_parts import as_step_part


@as_step_part("rotation")
def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`R_m x`, contiguous."""
    half = x.shape[-1] // 2
    rotated = torch.mul(x, cos, out=x.new_empty(x.shape))
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


@as_step_part("rotation")
def rotate_both(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`R_m x` and `R_-m x`, both contiguous, from shared products."""
    half = x.shape[-1] // 2
    even = torch.mul(x, cos, out=x.new_empty(x.shape))
    odd = x.new_empty(x.shape)
    torch.mul(x[..., half:], sin[..., :half], out=odd[..., :half])
    torch.mul(x[..., :half], sin[..., half:], out=odd[..., half:])
    odd[..., :half].neg_()
    return even + odd, even.sub_(odd)


@as_step_part("rotation")
def rotate_back(grads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x from those of `R_m x` and, if there is a second one, of `R_-m x`.

    Overwrites the first of two `grads`.
    """
    half = cos.shape[-1] // 2
    if len(grads) == 2:
        even = (grads[0] + grads[1]).mul_(cos)
        odd = grads[0].sub_(grads[1])
    else:
        even, odd = grads[0] * cos, grads[0]
    even[..., :half].addcmul_(odd[..., half:], sin[..., half:])
    even[..., half:].addcmul_(odd[..., :half], sin[..., :half], value=-1)
    return even
