"""Greedy generation with a KV cache: batched, left-padded, sorted by length, shared out over the ranks.

Shape legend: B prompts in a batch, L padded prompt length, S stop ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.scoring.share import (
    ONE_PROCESS,
    PromptShare,
    agree,
    in_order,
    shared_batches,
)
from bico_ds.model.architecture import id_list

# Of `GenerationConfig`; the others of sampling have no effect without `do_sample`.
_BEYOND_GREEDY = (
    "bad_words_ids", "begin_suppress_tokens", "do_sample", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "guidance_scale", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "repetition_penalty", "sequence_bias", "stop_strings", "suppress_tokens",
)  # fmt: skip


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, add_bos: bool = True) -> list[list[int]]:
    """Token ids as in training: BOS (where the tokenizer has one, and `add_bos`), then the text, which may have it."""
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    return [list(ids) if start and ids[:1] == start else start + list(ids) for ids in encoded]


def check_lengths(
    texts: Sequence[Sequence[int]], *, new_tokens: int, context: int | None, names: Sequence[str]
) -> None:
    """Raise `UserError` for an empty text, or one that leaves no room for `new_tokens` in a context of `context` tokens.

    The texts are prompts, or with `new_tokens` 0 prompts with their answers; `names` gives the file and line of each.
    """
    for ids, name in zip(texts, names, strict=True):
        if not ids:
            raise UserError(f"{name}: the tokenizer makes no token of this prompt")
        if context is None or len(ids) + new_tokens <= context:
            continue
        if new_tokens == 0:
            raise UserError(
                f"{name}: prompt and answer have {len(ids)} tokens, which do not fit the model's context of "
                f"{context}. Shorten them"
            )
        raise UserError(
            f"{name}: the prompt has {len(ids)} tokens; with {new_tokens} new ones it does not fit "
            f"the model's context of {context}. Shorten the prompt or lower max_new_tokens"
        )


def stop_ids(generation: GenerationConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens at which an answer ends: the generation config's, as for `generate`; without any, the tokenizer's EOS."""
    return id_list(generation.eos_token_id) or id_list(tokenizer.eos_token_id)


def beyond_greedy(generation: GenerationConfig) -> dict[str, Any]:
    """The settings of a generation config by which `generate` chooses other tokens than the most probable ones."""
    values = {key: getattr(generation, key, None) for key in _BEYOND_GREEDY}
    return {key: value for key, value in values.items() if value is True or value not in (None, 0, 1, [], {})}


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    share: PromptShare = ONE_PROCESS,
) -> list[str] | None:
    """The greedy continuation of every prompt as text, in their order, on every rank.

    `model`: a Hugging Face causal LM on `share.device`. A continuation ends before one of its `stop_ids` or after
    `max_new_tokens` (1 at least); other special tokens are left out of the text. Returns None on all ranks when
    `share.should_stop` was true on any of them before the end. Collective.
    """
    tokens = greedy_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, share=share)
    return None if tokens is None else tokenizer.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    share: PromptShare = ONE_PROCESS,
) -> list[list[int]] | None:
    """The tokens of the same continuations, without the one that ended them."""
    was_training = model.training
    model.eval()
    continuations: dict[int, list[int]] = {}
    stopped = False
    try:
        for indices in shared_batches(prompts, share):
            tokens = _decode(model, tokenizer, [prompts[i] for i in indices], max_new_tokens, share)
            stopped = tokens is None
            if tokens is None:
                break
            continuations.update(zip(indices.tolist(), tokens, strict=True))
            share.on_batch(len(indices))
    finally:
        model.train(was_training)
    return in_order(continuations, len(prompts), share, stopped=stopped)


def _decode(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    share: PromptShare,
) -> list[list[int]] | None:
    """New tokens of one batch, cut before the first of its `stop_ids`; None when asked to stop."""
    stops = stop_ids(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.config.vocab_size:  # one that was added later may have no embedding
        pad = next(iter(stops), 0)
    stops_S = torch.tensor(stops, dtype=torch.long, device=share.device)
    input_ids, attention_mask = _left_pad(prompts, pad, share.device)
    position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=share.device)
    cache, columns = None, []
    for _ in range(max_new_tokens):
        all_finished, stop = agree(bool(finished.all()), share)
        if stop:
            return None
        if all_finished:
            break
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        next_ids = output.logits[:, -1].argmax(-1)
        next_ids = torch.where(finished, pad, next_ids)
        columns.append(next_ids)
        finished = finished | torch.isin(next_ids, stops_S)
        input_ids = next_ids[:, None]
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
    continuations = torch.stack(columns, dim=1).tolist()
    ends = set(stops)
    return [list(takewhile(lambda token: token not in ends, ids)) for ids in continuations]


def _left_pad(prompts: list[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, L]."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return input_ids.to(device), mask.to(device)
