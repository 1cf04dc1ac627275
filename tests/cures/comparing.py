"""A tiny Llama of the package, its batches, and what the definitions make of the same documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bico_ds.attention.backend import Backend
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.layout import CPU_FUSED_POLICY, LayoutPolicy
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.table import read_spec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.objectives.base import BatchKey, Objective, TokenRoles, check_batch
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masks import MaskPolicy, TokenGrid
from tests.attention.attention_problems import NoKeyMask
from tests.cures import definitions
from tests.cures.definitions import Llama, Rows

BOS, EOS, PLACEHOLDER, VOCABULARY = 1, 2, 0, 61
MASK = 4
ROLES = TokenRoles(
    special_ids=(BOS, EOS),
    placeholder_id=PLACEHOLDER,
    vocabulary=VOCABULARY,
    encode=lambda text: tuple(5 + "abc".index(letter) for letter in text),
)
KEY = BatchKey(seed=5, epoch=1)
ROPE_THETA, EPS = 100.0, 1e-6
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "rms_norm_eps": EPS,
    # Large enough for scores of several units: at the usual 0.02 every row weighs its keys alike, wherever they are.
    "initializer_range": 0.4,
}

# Which kernel serves which rows of small documents. The fused kernel takes no fp64, flash kernels of GPUs no key mask.
TILES = LayoutPolicy(flash_from=10**9, tile_scores=100, tile_min_rows=4)
MIXED = LayoutPolicy(flash_from=9, tile_scores=50, tile_min_rows=4)
HIDDEN = LayoutPolicy(flash_from=3, tile_scores=50, tile_min_rows=4, tile_cost=1e9, hidden_cost=0.1)
BACKENDS: dict[str, str | Backend] = {
    "oracle": "oracle",
    "cpu-flash": "cpu-flash",
    "tiles": Backend(kernel=CpuFlash(), policy=TILES),
    "mixed": Backend(kernel=CpuFlash(), policy=MIXED),
    "hidden keys": Backend(kernel=CpuFlash(), policy=HIDDEN),
    "wider heads": Backend(kernel=NoKeyMask(), policy=HIDDEN),
}
FUSED = Backend(kernel=CpuFlash(), policy=CPU_FUSED_POLICY)


class ExactRotary(nn.Module):
    """cos and sin [1, T, D] in fp64: Hugging Face computes them in fp32, which would hide an error of 1e-6."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        channels = SHAPE["head_dim"] // 2
        frequency = ROPE_THETA ** (-torch.arange(channels, dtype=torch.float64) / channels)
        angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


class ExactNorm(nn.Module):
    """An RMSNorm in fp64, for the same reason; called as the package calls its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, *, residual: Tensor | None = None, fused: bool = False) -> Any:
        total = x if residual is None else x + residual
        normed = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight
        return normed if residual is None else (normed, total)


@cache
def tiny_llama(backend: str | Backend, dtype: torch.dtype = torch.float64) -> TrainableModel:
    """A random Llama of the package, whose attention runs by `backend`."""
    model = build_model(
        ModelSpec(config=SHAPE, dtype="fp32", loss_chunk_rows=7), seed=3, ds_config=None, device="cpu"
    )
    for layer in model.causal_lm.model.layers:
        layer.self_attn.packed_backend = backend
    if dtype == torch.float64:
        model, decoder = model.double(), model.causal_lm.model
        decoder.rotary_emb, decoder.norm = ExactRotary(), ExactNorm(decoder.norm.weight)
        for layer in decoder.layers:
            layer.input_layernorm = ExactNorm(layer.input_layernorm.weight)
            layer.post_attention_layernorm = ExactNorm(layer.post_attention_layernorm.weight)
    return model


def of_the_definitions(model: TrainableModel) -> Llama:
    """The same weights for the definitions, in fp64, as leaves of their own."""
    weights = {
        name: p.detach().double().clone().requires_grad_() for name, p in model.causal_lm.named_parameters()
    }
    heads, key_value_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    return Llama(
        weights=weights, heads=heads, key_value_heads=key_value_heads, rope_theta=ROPE_THETA, eps=EPS
    )


@dataclass(frozen=True, kw_only=True)
class Cure:
    """An objective as a recipe names it, and the definition of what it makes of one document with this mask."""

    recipe: dict[str, Any]
    rows: Callable[[Document, list[bool]], Rows]

    def objective(self) -> Objective:
        return build_objectives([read_spec(self.recipe)], ROLES)[0]


def _bico(predict: str, document: Document, masked: list[bool]) -> Rows:
    return definitions.bico(document.token_ids.tolist(), masked, PLACEHOLDER, predict=predict)


def _mlm_u(predict: str, document: Document, masked: list[bool]) -> Rows:
    """With its weight as a batch has it: rounding to fp32 would hide an error, and is more than 1e-7 of some gradients."""
    rows = definitions.mlm_u(document.token_ids.tolist(), masked, PLACEHOLDER, predict=predict)
    return replace(rows, weight=float(np.float32(rows.weight)))


def _abi(spans: str, document: Document, masked: list[bool]) -> Rows:
    return definitions.abi(document.token_ids.tolist(), masked, spans=spans)


def _reverse(document: Document, masked: list[bool], *, entities: bool) -> Rows:
    first, text, last = _between_special(document)
    spans = [tuple(span) for span in document.entity_spans - text.start] if entities else []
    words = document.word_starts[text].tolist()
    parts = definitions.segments(document.token_ids[text].tolist(), words, spans)
    return definitions.reverse(parts, first=first, last=last)


def _reverse_random(document: Document, masked: list[bool]) -> Rows:
    """With the segments that the package draws, which must be ones of 1 … 3 words."""
    first, text, last = _between_special(document)
    tokens = document.token_ids[text].tolist()
    parts = _drawn_segments(document, text)
    places = [i for start, end in parts for i in range(start, end)]
    assert places == list(range(len(tokens)))
    for start, end in parts:
        words = definitions.segments(tokens[start:end], document.word_starts[text][start:end].tolist(), [])
        assert (start == 0 or document.word_starts[text][start]) and len(words) <= 3
    return definitions.reverse([tokens[start:end] for start, end in parts], first=first, last=last)


def _drawn_segments(document: Document, text: slice) -> list[tuple[int, int]]:
    """Ranges of the text, in its order, from the batch of a document whose tokens tell their places."""
    numbered = document.token_ids.copy()
    numbered[text] = 1000 + np.arange(text.stop - text.start)
    batch = (
        CURES["reverse, random"].objective().build(Documents.of([replace(document, token_ids=numbered)]), KEY)
    )
    places = [int(token) - 1000 for token in batch.input_ids if token >= 1000]
    parts: list[tuple[int, int]] = []
    for place in places:
        if parts and place == parts[-1][1]:
            parts[-1] = (parts[-1][0], place + 1)
        else:
            parts.append((place, place + 1))
    return sorted(parts)


def _between_special(document: Document) -> tuple[list[int], slice, list[int]]:
    """The special tokens in front, the text, and those behind it."""
    tokens = document.token_ids.tolist()
    plain = [i for i, token in enumerate(tokens) if token not in (BOS, EOS)]
    start, end = (plain[0], plain[-1] + 1) if plain else (len(tokens), len(tokens))
    return tokens[:start], slice(start, end), tokens[end:]


def _masked_ft(
    document: Document, masked: list[bool], *, instruction: list[int], separator: list[int]
) -> Rows:
    tokens = document.token_ids.tolist()
    return definitions.masked_ft(tokens, masked, mask_id=MASK, instruction=instruction, separator=separator)


CURES = {
    "ntp": Cure(recipe={"kind": "ntp"}, rows=lambda d, masked: definitions.ntp(d.token_ids.tolist())),
    "bico": Cure(recipe={"kind": "bico"}, rows=partial(_bico, "next")),
    "bico, same": Cure(recipe={"kind": "bico", "predict": "same"}, rows=partial(_bico, "same")),
    "abi": Cure(recipe={"kind": "abi"}, rows=partial(_abi, "separate")),
    "abi, left to right": Cure(
        recipe={"kind": "abi", "spans": "left_to_right"}, rows=partial(_abi, "left_to_right")
    ),
    "mlm_u, next": Cure(recipe={"kind": "mlm_u", "predict": "next"}, rows=partial(_mlm_u, "next")),
    "mlm_u, same": Cure(recipe={"kind": "mlm_u", "predict": "same"}, rows=partial(_mlm_u, "same")),
    "reverse": Cure(recipe={"kind": "reverse"}, rows=partial(_reverse, entities=False)),
    "reverse, entity": Cure(
        recipe={"kind": "reverse", "segments": "entity"}, rows=partial(_reverse, entities=True)
    ),
    "reverse, random": Cure(
        recipe={"kind": "reverse", "segments": "random", "max_words": 3}, rows=_reverse_random
    ),
    "masked_ft": Cure(
        recipe={"kind": "masked_ft", "mask_id": MASK, "instruction": "ab", "separator": "c"},
        rows=partial(_masked_ft, instruction=[5, 6], separator=[7]),
    ),
    "masked_ft, bare": Cure(
        recipe={"kind": "masked_ft", "mask_id": MASK}, rows=partial(_masked_ft, instruction=[], separator=[])
    ),
}


# Documents.


def make_documents(masks: list[list[bool]], seed: int = 0) -> Documents:
    """Random documents of the masks' lengths, between BOS and EOS where there is room, with words, an entity and a prompt.

    Masked tokens are no special ones; some of the others inside are.
    """
    rng = np.random.default_rng(seed)
    documents = []
    for index, masked in enumerate(masks):
        length = len(masked)
        tokens = rng.integers(3, VOCABULARY, length)
        tokens[(rng.random(length) < 0.1) & ~np.array(masked)] = EOS
        tokens[0] = BOS
        if length > 1 and not masked[-1]:
            tokens[-1] = EOS
        start = int(rng.integers(0, length))
        documents.append(
            Document(
                token_ids=tokens,
                source=0,
                id=100 + index,
                prompt_length=int(rng.integers(0, length + 1)),
                word_starts=rng.random(length) < 0.5,
                entity_spans=np.array([[start, int(rng.integers(start, length)) + 1]]),
            )
        )
    return Documents.of(documents)


def mask_of(runs: list[int]) -> list[bool]:
    """A mask of kept and masked runs of these lengths by turns; the first is kept, and has one token at least."""
    return [bool(index % 2) for index, run in enumerate([max(runs[0], 1), *runs[1:]]) for _ in range(run)]


# One document without a masked token, one masked to its end, spans of one token and of several, neighbours one apart.
MASKS = [
    [False],
    mask_of([4]),
    mask_of([1, 5]),
    mask_of([2, 1, 1, 3, 1, 1, 4]),
    mask_of([3, 6, 2, 4, 1, 2]),
    [False, True],
]
drawn_masks = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).map(mask_of), min_size=1, max_size=4
)


# What is compared.


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a batch gives: its mean loss, the gradient of each weight by its name, and each prediction's loss and weight [N].

    Predictions are in the order of documents, and of positions within one.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    losses: Tensor
    weights: Tensor


def built(cure: Cure, documents: Documents, masks: list[list[bool]]) -> PackedBatch:
    """The batch of these documents with these masks in place of drawn ones; it passes the package's own check."""
    by_name = {d.id: mask for d, mask in zip(documents, masks, strict=True)}

    def draw(self: MaskPolicy, documents: Documents, grid: TokenGrid, key: BatchKey) -> np.ndarray:
        return np.concatenate([np.array(by_name[d.id]) for d in documents])

    objective = cure.objective()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskPolicy, "draw", draw)
        batch = objective.build(documents, KEY)
    room = int(objective.expand(documents.lengths).sum())
    check_batch(batch, documents, room=room, vocabulary=VOCABULARY)
    return batch


def by_the_package(model: TrainableModel, batch: PackedBatch) -> Trained:
    """The weighted mean of the batch's losses, as a step trains it."""
    model.zero_grad()
    found = model(batch)
    given = batch.loss_weights
    weights = torch.ones(len(batch.targets)) if given is None else given
    loss = found.loss / weights.double().sum() if len(weights) else found.loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.causal_lm.named_parameters()}
    order = _order(batch)
    return Trained(
        loss=loss.detach(), gradients=gradients, losses=found.row_losses[order], weights=weights[order]
    )


@torch.no_grad()
def losses_of(model: TrainableModel, batch: PackedBatch) -> Tensor:
    """The losses of a batch alone, as `Trained` has them."""
    return model(batch).row_losses[_order(batch)]


def places_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Of each row, its document, by its number in the batch, and its position: int64 [T] both."""
    kept = torch.repeat_interleave(batch.plan.cu_seqlens.diff().long())
    return torch.cat([kept, batch.plan.live_document]), batch.position_ids


def _order(batch: PackedBatch) -> Tensor:
    """Of the predictions, by document and position of their rows."""
    document, position = (place[batch.loss_rows].numpy() for place in places_of(batch))
    return torch.from_numpy(np.lexsort((position, document)))


def rows_of(cure: Cure, documents: Documents, masks: list[list[bool]]) -> list[Rows]:
    """What the definition makes of each document with its mask."""
    return [cure.rows(d, masked) for d, masked in zip(documents, masks, strict=True)]


def by_the_definition(model: TrainableModel, rows: list[Rows]) -> Trained:
    llama = of_the_definitions(model)
    loss = definitions.batch_loss(llama, rows)
    gradients = torch.autograd.grad(loss, list(llama.weights.values()), allow_unused=True)
    zero = {name: torch.zeros_like(weight) for name, weight in llama.weights.items()}
    found = zip(llama.weights, gradients, strict=True)
    each = [(x.detach(), r.weight) for r in rows for x in definitions.losses(llama, r)]
    return Trained(
        loss=loss.detach(),
        gradients=zero | {name: grad for name, grad in found if grad is not None},
        losses=torch.tensor([loss for loss, _ in each], dtype=torch.float64),
        weights=torch.tensor([weight for _, weight in each], dtype=torch.float64),
    )


@cache
def expected(cure: str, seed: int, dtype: torch.dtype = torch.float64) -> Trained:
    """`by_the_definition` of the documents that `make_documents` draws of `MASKS` by this seed."""
    rows = rows_of(CURES[cure], make_documents(MASKS, seed), MASKS)
    return by_the_definition(tiny_llama("oracle", dtype), rows)


def difference(found: Trained, expected: Trained) -> float:
    """The largest error of a loss, weight or gradient, relative to the tensor's largest entry.

    Of a gradient, to 1e-3 of the largest of all gradients at least. Infinite where the predictions are not as many.
    """
    if len(found.losses) != len(expected.losses):
        return math.inf
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    errors = [_error(getattr(found, n), getattr(expected, n), 1e-3) for n in ("loss", "losses", "weights")]
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        errors.append(_error(found.gradients[name], gradient, 1e-3 * largest))
    return max(errors)


def _error(found: Tensor, expected: Tensor, least: float) -> float:
    if not expected.numel():
        return 0.0
    size = max(float(expected.abs().max()), least, 1e-9)
    return float(((found.double() - expected).abs().max() / size).nan_to_num(math.inf))
