"""Dense attention over tiles, for short documents and live rows: both rotations, one softmax, its own backward.

Half-precision inputs multiply in their dtype and run the softmax in fp32. The backward pass recomputes the weights from
lse and the inputs.

Shape legend: B documents in a tile, R query rows each, K keys each, H query heads, N key heads, G = H / N,
D head dimension, T rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients, accumulate_dtype
from bico_ds.attention.rotation import rotate_back, rotate_both, rotate_forward
from bico_ds.attention.tiles import Tile, TileMasks


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """One rotation of a tile.

    `q`: scaled queries [B, N, G·R, D]; `k`: keys [B, N, K, D]; `factor`: of their scores, 1 where they count, else 0.
    """

    q: Tensor
    k: Tensor
    factor: Tensor


def dense_forward(tile: Tile, inputs: AttentionInputs, results: AttentionResults) -> None:
    """Write the tile's rows of `results`, which have one row more than the batch: row T takes the padding."""
    masks = tile.masks_for(inputs.q.dtype, causal=inputs.causal)
    scores = _scores(inputs, masks, _directions(tile, inputs, masks), results.lse.dtype)
    row_max = scores.amax(-1, keepdim=True)
    weights = scores.sub_(row_max).exp_()
    total = weights.sum(-1, keepdim=True)
    v = _gather(inputs.v, tile.key_rows, tile).contiguous()
    out_tile = _grouped(weights.div_(total).to(v.dtype), v) @ v
    _write(results.out, tile.query_slots, _ungrouped(out_tile, inputs.q.shape[1]))
    _write(results.lse.unsqueeze(-1), tile.query_slots, row_max.add_(total.log_()))


def dense_backward(
    tile: Tile,
    inputs: AttentionInputs,
    results: AttentionResults,
    grad_out: Tensor,
    grads: Gradients,
    *,
    is_part: bool,
) -> None:
    """Write the tile's rows of the first of `grads`, of q, and add to the others, of k and v; they have T + 1 rows.

    The lse of `results` [T+1, H] holds +inf in row T, so that padded queries weigh nothing. `is_part`: the softmax of
    `results` is over more keys than the tile's, whose weights then sum to less than 1.
    """
    dq, dk, dv = grads
    masks = tile.masks_for(inputs.q.dtype, causal=inputs.causal)
    directions = _directions(tile, inputs, masks)
    lse = _gather(results.lse.unsqueeze(-1), tile.query_slots, tile)
    weights = _scores(inputs, masks, directions, lse.dtype).sub_(lse).exp_()
    v = _gather(inputs.v, tile.key_rows, tile).contiguous()
    grad_tile = _gather(grad_out, tile.query_rows, tile)
    d_out = _grouped(grad_tile, v)
    _accumulate(dv, tile, _grouped(weights.to(v.dtype), v).transpose(-1, -2) @ d_out)
    d_weights = _ungrouped(d_out @ v.transpose(-1, -2), inputs.q.shape[1]).to(weights.dtype)
    if is_part:
        delta = _grad_sum(_gather(results.out, tile.query_rows, tile), grad_tile, weights.dtype)
        d_weights -= delta.unsqueeze(-1)
        d_scores = weights.mul_(d_weights).to(v.dtype)
    else:
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(v.dtype)
    dq_parts, dk_parts = [], []
    for direction in directions:
        part = _grouped(d_scores * direction.factor, v)
        dq_parts.append(_ungrouped(part @ direction.k, inputs.q.shape[1]))
        dk_parts.append(part.transpose(-1, -2) @ direction.q)
    _write(dq, tile.query_slots, rotate_back(dq_parts, *_tables(inputs, tile.query_rows, tile, inputs.scale)))
    _accumulate(dk, tile, rotate_back(dk_parts, *_tables(inputs, tile.key_rows, tile)))


def own_key_forward(inputs: AttentionInputs) -> AttentionResults:
    """Of P rows that see their own key alone: out is their value, lse its score."""
    q, k = _widened(inputs.q), _repeated(_widened(inputs.k), inputs)
    lse = (q * k * _squared_lengths(inputs)).sum(-1) * inputs.scale
    return AttentionResults(out=_repeated(inputs.v, inputs), lse=lse)


def own_key_backward(inputs: AttentionInputs, results: AttentionResults, grad_out: Tensor) -> Gradients:
    """Gradients of q [P, H, D], k and v [P, N, D], in at least fp32, by each row's own key.

    `results`: of a softmax that has more keys than this one.
    """
    own = own_key_forward(inputs)
    weights = (own.lse - results.lse).exp()
    d_weights, delta = (_grad_sum(x.out, grad_out, weights.dtype) for x in (own, results))
    d_scores = (weights * (d_weights - delta) * inputs.scale).unsqueeze(-1) * _squared_lengths(inputs)
    dq = d_scores * _repeated(_widened(inputs.k), inputs)
    dk, dv = d_scores * _widened(inputs.q), weights.unsqueeze(-1) * _widened(grad_out)
    return dq, *(x.unflatten(1, (inputs.k.shape[1], -1)).sum(2) for x in (dk, dv))


def _squared_lengths(inputs: AttentionInputs) -> Tensor:
    """[P, 1, D]: what a rotation there and back, as in a row's score of its own key, multiplies each pair of columns by."""
    return (_widened(inputs.cos).square() + _widened(inputs.sin).square()).unsqueeze(1)


def _repeated(x: Tensor, inputs: AttentionInputs) -> Tensor:
    """[P, N, D] as [P, H, D]: each key head as often as query heads share it."""
    return x.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], dim=1)


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _grad_sum(out: Tensor, grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    """Of out and its gradient, both [..., D], their product [...]: the softmax's part of the gradient of each score."""
    return (out.to(dtype) * grad_out.to(dtype)).sum(-1)


def _directions(tile: Tile, inputs: AttentionInputs, masks: TileMasks) -> list[_Direction]:
    """Forward, and in bidirectional mode reversed, rotation of the tile's rows."""
    q, k = _gather(inputs.q, tile.query_rows, tile), _gather(inputs.k, tile.key_rows, tile)
    q_tables = _tables(inputs, tile.query_rows, tile, inputs.scale)
    k_tables = _tables(inputs, tile.key_rows, tile)
    if inputs.causal:
        pairs = [(rotate_forward(q, *q_tables), rotate_forward(k, *k_tables))]
    else:
        pairs = list(zip(rotate_both(q, *q_tables), rotate_both(k, *k_tables), strict=True))
    return [
        _Direction(q=_grouped(rotated_q, k), k=rotated_k, factor=factor)
        for (rotated_q, rotated_k), factor in zip(pairs, masks.factors, strict=True)
    ]


def _scores(
    inputs: AttentionInputs, masks: TileMasks, directions: list[_Direction], dtype: torch.dtype
) -> Tensor:
    """Scores [B, H, R, K] of the one softmax in `dtype`: forward up to the split, reversed behind it."""
    scores = masks.bias
    for direction in directions:
        part = _ungrouped(direction.q @ direction.k.transpose(-1, -2), inputs.q.shape[1])
        scores = torch.addcmul(scores, part, direction.factor)
    return scores.to(dtype, copy=True)


def _tables(inputs: AttentionInputs, rows: Tensor, tile: Tile, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rows, times `factor`: [B, 1, rows, D]."""
    documents = tile.shape[0]
    cos, sin = (
        x.index_select(0, rows).unflatten(0, (documents, -1)).unsqueeze(1) for x in (inputs.cos, inputs.sin)
    )
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _gather(x: Tensor, rows: Tensor, tile: Tile) -> Tensor:
    """Rows of x [T, H, D] as a view [B, H, rows, D]."""
    return x.index_select(0, rows).unflatten(0, (tile.shape[0], -1)).transpose(1, 2)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, R, D] as [B, N, G·R, D]: the query heads that share a key head, as rows of one matrix."""
    B, N = keys.shape[:2]
    return x.reshape(B, N, -1, x.shape[-1])


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """[B, N, G·R, D] as [B, H, R, D]."""
    return x.view(x.shape[0], heads, -1, x.shape[-1])


def _write(target: Tensor, slots: Tensor, x: Tensor) -> None:
    """`target[slots] = x` for target [T+1, H, D], x [B, H, rows, D]."""
    target.index_copy_(0, slots, x.transpose(1, 2).flatten(0, 1))


def _accumulate(target: Tensor, tile: Tile, x: Tensor) -> None:
    """`target[key_slots] += x`; slots are distinct but for the trash row, where any value will do."""
    added = target.index_select(0, tile.key_slots).add_(x.transpose(1, 2).flatten(0, 1))
    target.index_copy_(0, tile.key_slots, added)
