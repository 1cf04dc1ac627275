"""Every objective from its definition: one document at a time, dense, in the dtype of the weights; nothing of the package.

A definition says three things of a document: which row has which token at which position, which rows a row sees, and
which row predicts which token. They were written before the objectives' code was read, from the papers: BICO (2311.07468),
GLM's blank infilling (2103.10360), MLM-U (2406.05183), reverse training (2403.13799), masked fine-tuning (2510.09885). Where
the package leaves rows out of the model, because nothing reads them, a definition keeps them: every document of BICO has all
of its L rows.

Shape legend: R rows of a document, E hidden size, H heads, C pairs of channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The weights of a Llama by Hugging Face's names, and what its shapes do not tell."""

    weights: dict[str, Tensor]
    heads: int
    key_value_heads: int
    rope_theta: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one document is to the model.

    `sees[i][j]`: row i has row j as a key. `predicts[i]`: the token that row i predicts; None: none. `weight`: of each of
    the document's predictions in the mean over a batch.
    """

    tokens: list[int]
    positions: list[int]
    sees: list[list[bool]]
    predicts: list[int | None]
    weight: float = 1.0


# What an objective makes of a document.


def ntp(tokens: list[int]) -> Rows:
    """Next-token prediction: row i sees the rows up to itself and predicts the token at i + 1."""
    length = len(tokens)
    return Rows(
        tokens=tokens,
        positions=list(range(length)),
        sees=_square(length, lambda i, j: j <= i),
        predicts=[*tokens[1:], None],
    )


def bico(tokens: list[int], masked: list[bool], placeholder: int, *, predict: str = "next") -> Rows:
    """BICO: placeholders for the masked tokens, which no row has as a key; every row sees all kept ones.

    `next`: the row before a masked token predicts it. `same`: its own row does, as in BERT.
    """
    length = len(tokens)
    predicts: list[int | None] = [None] * length
    for i in range(length):
        if masked[i]:
            predicts[i if predict == "same" else i - 1] = tokens[i]
    return Rows(
        tokens=[placeholder if masked[i] else tokens[i] for i in range(length)],
        positions=list(range(length)),
        sees=_square(length, lambda i, j: not masked[j]),
        predicts=predicts,
    )


def mlm_u(tokens: list[int], masked: list[bool], placeholder: int, *, predict: str) -> Rows:
    """MLM-U: BICO's rows; a document's loss is the mean over its masked tokens."""
    rows = bico(tokens, masked, placeholder, predict=predict)
    count = sum(masked)
    return Rows(
        tokens=rows.tokens,
        positions=rows.positions,
        sees=rows.sees,
        predicts=rows.predicts,
        weight=1 / count if count else 0.0,
    )


def abi(tokens: list[int], masked: list[bool], *, spans: str) -> Rows:
    """GLM's autoregressive blank infilling; a span is a maximal run of masked tokens.

    Kept tokens see each other. A masked one sees the kept ones, and the masked ones up to itself: of its own span
    (`separate`), or of every span (`left_to_right`). The row before a masked token predicts it.
    """
    length = len(tokens)
    span = [0] * length
    for i in range(1, length):
        span[i] = span[i - 1] + (masked[i] != masked[i - 1])

    def sees(i: int, j: int) -> bool:
        if not masked[j]:
            return True
        return masked[i] and j <= i and (spans == "left_to_right" or span[i] == span[j])

    return Rows(
        tokens=tokens,
        positions=list(range(length)),
        sees=_square(length, sees),
        predicts=[tokens[i + 1] if i + 1 < length and masked[i + 1] else None for i in range(length)],
    )


def reverse(parts: list[list[int]], *, first: list[int], last: list[int]) -> Rows:
    """Reverse training: the parts in reversed order, each as it is, between what stays first and what stays last."""
    text = [token for part in reversed(parts) for token in part]
    return ntp([*first, *text, *last])


def masked_ft(
    tokens: list[int], masked: list[bool], *, mask_id: int, instruction: list[int], separator: list[int]
) -> Rows:
    """Masked fine-tuning: instruction, masked text, separator and the text, which is predicted; all of it causal."""
    masked_copy = [mask_id if hidden else token for token, hidden in zip(tokens, masked, strict=True)]
    prompt = [*instruction, *masked_copy, *separator]
    rows = ntp([*prompt, *tokens])
    return Rows(
        tokens=rows.tokens,
        positions=rows.positions,
        sees=rows.sees,
        predicts=[*[None] * (len(prompt) - 1), *rows.predicts[len(prompt) - 1 :]],
    )


def segments(tokens: list[int], word_starts: list[bool], entities: list[tuple[int, int]]) -> list[list[int]]:
    """Words; with an entity, a half-open range, all words that it touches are one segment."""
    parts: list[list[int]] = []
    for i, token in enumerate(tokens):
        inside = any(start < i < end for start, end in entities)
        if not parts or (word_starts[i] and not inside):
            parts.append([])
        parts[-1].append(token)
    return parts


# What the model makes of it.


def losses(model: Llama, rows: Rows) -> list[Tensor]:
    """The cross entropy of each prediction of a document, in the order of its rows."""
    wanted = [(i, token) for i, token in enumerate(rows.predicts) if token is not None]
    if not wanted:
        return []
    logits = hidden_states(model, rows) @ model.weights["lm_head.weight"].T
    return [torch.logsumexp(logits[i], 0) - logits[i, token] for i, token in wanted]


def batch_loss(model: Llama, documents: list[Rows]) -> Tensor:
    """The weighted mean of all predictions of the documents; 0 where there is none."""
    total, weights = model.weights["lm_head.weight"].sum() * 0, 0.0
    for rows in documents:
        for loss in losses(model, rows):
            total, weights = total + rows.weight * loss, weights + rows.weight
    return total / weights if weights else total


def hidden_states(model: Llama, rows: Rows) -> Tensor:
    """The last hidden states [R, E]."""
    w = model.weights
    sees = torch.tensor(rows.sees)
    positions = torch.tensor(rows.positions)
    distance = (positions[:, None] - positions[None, :]).abs()
    x = w["model.embed_tokens.weight"][torch.tensor(rows.tokens)]
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in w:
        own = {
            name.split(f"model.layers.{layer}.")[1]: v for name, v in w.items() if f".layers.{layer}." in name
        }
        x = x + _attention(model, own, _norm(x, own["input_layernorm.weight"], model.eps), sees, distance)
        y = _norm(x, own["post_attention_layernorm.weight"], model.eps)
        gate, up = y @ own["mlp.gate_proj.weight"].T, y @ own["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ own["mlp.down_proj.weight"].T
        layer += 1
    assert layer
    return _norm(x, w["model.norm.weight"], model.eps)


def _attention(model: Llama, own: dict[str, Tensor], x: Tensor, sees: Tensor, distance: Tensor) -> Tensor:
    """Softmax over the keys that a row sees, by the rotary product of the *distance* of query and key, whatever its sign.

    RoPE's product of a query at m and a key at n depends on m − n. BICO reverses the rotation of the keys at n > m, which
    leaves |m − n|; a causal row has no such keys. So one formula holds for all.
    """
    q = _complex(x @ own["self_attn.q_proj.weight"].T, model.heads)
    k = _complex(x @ own["self_attn.k_proj.weight"].T, model.key_value_heads)
    v = (x @ own["self_attn.v_proj.weight"].T).unflatten(1, (model.key_value_heads, -1))
    channels = q.shape[2]
    frequency = model.rope_theta ** (-torch.arange(channels, dtype=x.dtype) / channels)
    heads = []
    for head in range(model.heads):
        of_head = head // (model.heads // model.key_value_heads)
        turned = torch.polar(torch.ones((), dtype=x.dtype), distance[:, :, None] * frequency)
        products = (q[:, head][:, None] * k[:, of_head].conj()[None] * turned).real.sum(2)
        scores = (products / (2 * channels) ** 0.5).masked_fill(~sees, -torch.inf)
        heads.append(torch.softmax(scores, 1) @ v[:, of_head])
    return torch.cat(heads, 1) @ own["self_attn.o_proj.weight"].T


def _complex(x: Tensor, heads: int) -> Tensor:
    """[R, H * 2 C] to complex [R, H, C]: Hugging Face's Llama turns channel c together with channel c + C."""
    real, imaginary = x.unflatten(1, (heads, -1)).chunk(2, dim=2)
    return torch.complex(real, imaginary)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _square(length: int, sees: Callable[[int, int], bool]) -> list[list[bool]]:
    return [[sees(i, j) for j in range(length)] for i in range(length)]
