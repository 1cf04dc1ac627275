"""Log-probabilities of given texts: answers after their prompts, and running text (perplexity).

Shape legend: B sequences in a batch, L padded length, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.scoring.share import ONE_PROCESS, PromptShare, agree, in_order, shared_batches

T = TypeVar("T")

_LOGIT_ROWS = 1024  # rows whose fp32 log-softmax exists at one time


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A text to score: all its `ids`, of which the last `answer_tokens` count."""

    ids: tuple[int, ...]
    answer_tokens: int


def encode_answers(
    tokenizer: Tokenizer, prompts: Sequence[str], answers: Sequence[str], *, add_bos: bool = True
) -> list[Scored]:
    """Prompt and answer as one text, tokenized as in training. A token that spans both belongs to the answer."""
    encoded = tokenizer(
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    bos = tokenizer.bos_token_id if add_bos else None
    scored = []
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        start = () if bos is None or ids[:1] == [bos] else (bos,)
        answer_tokens = sum(end > len(prompt) for _, end in offsets)
        answer_tokens = min(answer_tokens, len(start) + len(ids) - 1)  # the first token is never predicted
        scored.append(Scored(ids=(*start, *ids), answer_tokens=answer_tokens))
    return scored


def log_probabilities(
    model: PreTrainedModel, texts: Sequence[Scored], share: PromptShare = ONE_PROCESS
) -> list[float] | None:
    """log P(answer | prompt) of every text: the sum over the answer's tokens, in nats, on every rank.

    `model`: a Hugging Face causal LM on `share.device`. Returns None on all ranks when `share.should_stop` was true on any
    of them; with `share.synced` they stop together, after the same number of batches. Collective.
    """
    return _of_all(_batch_sums, model, texts, share)


def greedy_matches(
    model: PreTrainedModel, texts: Sequence[Scored], share: PromptShare = ONE_PROCESS
) -> list[int] | None:
    """Of every text the number of answer tokens that are the likeliest next ones after all before them, on every rank.

    Otherwise as `log_probabilities`.
    """
    return _of_all(_batch_matches, model, texts, share)


@torch.no_grad()
def _of_all(
    of_batch: Callable[[PreTrainedModel, Sequence[Scored], torch.device], list[T]],
    model: PreTrainedModel,
    texts: Sequence[Scored],
    share: PromptShare,
) -> list[T] | None:
    """What `of_batch` finds for each text, in their order, on every rank; None where any was asked to stop."""
    was_training = model.training
    model.eval()
    found: dict[int, T] = {}
    stopped = False
    try:
        for indices in shared_batches([text.ids for text in texts], share):
            _, stopped = agree(True, share)
            if stopped:
                break
            values = of_batch(model, [texts[i] for i in indices], share.device)
            found.update(zip(indices.tolist(), values, strict=True))
            share.on_batch(len(indices))
    finally:
        model.train(was_training)
    return in_order(found, len(texts), share, stopped=stopped)


def _batch_sums(model: PreTrainedModel, batch: Sequence[Scored], device: torch.device) -> list[float]:
    """The sum of each text's answer log-probabilities, in nats."""
    text_N, logits_NV, targets_N = _answer_logits(model, batch, device)
    sums = torch.zeros(len(batch), dtype=torch.float64, device=device)
    return sums.index_add(0, text_N, _token_log_probs(logits_NV, targets_N).double()).tolist()


def _batch_matches(model: PreTrainedModel, batch: Sequence[Scored], device: torch.device) -> list[int]:
    """The number of each text's answer tokens that have the highest logit."""
    text_N, logits_NV, targets_N = _answer_logits(model, batch, device)
    counts = torch.zeros(len(batch), dtype=torch.long, device=device)
    return counts.index_add(0, text_N, (logits_NV.argmax(-1) == targets_N).long()).tolist()


def _answer_logits(
    model: PreTrainedModel, batch: Sequence[Scored], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(text_N, logits_NV, targets_N): of every answer token its text's number, the logits that predict it, and its id.

    Texts are padded on the right: positions and mask need no change, since no row that is scored attends to padding.
    """
    width = max(len(text.ids) for text in batch)
    input_ids = torch.tensor([[*text.ids, *[0] * (width - len(text.ids))] for text in batch], device=device)
    logits_BLV = model(input_ids=input_ids, use_cache=False).logits
    numbers: list[int] = []
    positions: list[int] = []
    for number, text in enumerate(batch):
        first = len(text.ids) - text.answer_tokens
        numbers += [number] * text.answer_tokens
        positions += range(first - 1, len(text.ids) - 1)
    text_N = torch.tensor(numbers, device=device, dtype=torch.long)
    position_N = torch.tensor(positions, device=device, dtype=torch.long)
    return text_N, logits_BLV[text_N, position_N], input_ids[text_N, position_N + 1]


def _token_log_probs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    parts = [
        logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for logits, targets in zip(logits_NV.split(_LOGIT_ROWS), targets_N.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else logits_NV.new_zeros(0)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text. `bits_per_byte` compares models with different tokenizers.

    Figures compare only for the same `window` (in tokens) and the same text (`text_sha256`).
    """

    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    window: int
    text_sha256: str


def encode_windows(tokenizer: Tokenizer, text: str, *, window: int, add_bos: bool = True) -> list[Scored]:
    """`text` in windows of `window` tokens that do not overlap, each with its own BOS in front.

    Every token counts once (without a BOS the first token of a window is only context). Raises `UserError` where no token is
    left to predict.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if window < 2:
        raise UserError(
            f"--window {window}: a window needs two tokens at least, one to read and one to predict"
        )
    texts = cut_windows(ids, window=window, bos=tokenizer.bos_token_id if add_bos else None)
    if not texts:
        raise UserError("the retention text has no token to predict; name a longer one")
    return texts


def cut_windows(ids: Sequence[int], *, window: int, bos: int | None) -> list[Scored]:
    """`ids` in windows as `encode_windows` makes them of a text; those without a token to predict are left out."""
    start = () if bos is None else (bos,)
    size = window - len(start)
    pieces = [(*start, *ids[i : i + size]) for i in range(0, len(ids), size)]
    return [Scored(ids=piece, answer_tokens=len(piece) - 1) for piece in pieces if len(piece) > 1]


def mean_nll(
    model: PreTrainedModel, texts: Sequence[Scored], share: PromptShare = ONE_PROCESS
) -> float | None:
    """-log P of the texts' answer tokens, the mean in nats; its exponential is the perplexity. As `log_probabilities`."""
    sums = log_probabilities(model, texts, share)
    return None if sums is None else -sum(sums) / sum(text.answer_tokens for text in texts)


def text_perplexity(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int,
    add_bos: bool = True,
    share: PromptShare = ONE_PROCESS,
) -> Perplexity | None:
    """Perplexity of `text` in windows of `window` tokens (`encode_windows`).

    Use the same text, tokenizer and window before and after fine-tuning: the figure depends on all three. Returns None as
    `log_probabilities` does, and raises `UserError` as `encode_windows` does.
    """
    texts = encode_windows(tokenizer, text, window=window, add_bos=add_bos)
    nll = mean_nll(model, texts, share)
    if nll is None:
        return None
    tokens = sum(item.answer_tokens for item in texts)
    return Perplexity(
        perplexity=math.exp(nll),
        nll_per_token=nll,
        bits_per_byte=nll * tokens / math.log(2) / len(text.encode()),
        tokens=tokens,
        window=window,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
