from __future__ import annotations

import math

import pytest
import torch

from bico_ds.common.errors import UserError
from bico_ds.evaluation.scoring.likelihood import Scored, encode_answers, log_probabilities, text_perplexity
from bico_ds.evaluation.scoring.share import PromptShare


def _by_hand(model, ids: list[int], answer_tokens: int) -> float:
    """Hugging Face's own loss on one unpadded sequence, in nats of the answer."""
    labels = [-100] * (len(ids) - answer_tokens) + ids[-answer_tokens:]
    loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    return -loss.item() * answer_tokens


def test_log_probabilities_agree_with_hugging_face_loss_whatever_the_batch(tiny_llama):
    torch.manual_seed(3)
    texts = [
        Scored(ids=(1, *torch.randint(3, 43, (length,)).tolist()), answer_tokens=answer)
        for length, answer in ((9, 2), (3, 3), (20, 1), (7, 5), (12, 4))
    ]
    expected = [_by_hand(tiny_llama, list(text.ids), text.answer_tokens) for text in texts]
    for batch_size in (1, 2, 5):
        found = log_probabilities(tiny_llama, texts, PromptShare(batch_size=batch_size))
        assert found == pytest.approx(expected, abs=1e-4)


def test_only_the_answer_is_scored(tokenizer):
    (scored,) = encode_answers(tokenizer, ["w0 w1 w2"], [" w3 w4"])
    assert scored == Scored(ids=(1, 3, 4, 5, 6, 7), answer_tokens=2)
    (scored,) = encode_answers(tokenizer, ["w0"], [" w3"], add_bos=False)
    assert scored == Scored(ids=(3, 6), answer_tokens=1)


def test_perplexity_counts_every_token_once(tiny_llama, tokenizer):
    words = [f"w{(5 * i) % 40}" for i in range(23)]
    text = " ".join(words)
    result = text_perplexity(tiny_llama, tokenizer, text, window=9, share=PromptShare(batch_size=2))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [[1, *ids[i : i + 8]] for i in range(0, 23, 8)]
    nll = -sum(_by_hand(tiny_llama, piece, len(piece) - 1) for piece in pieces)
    assert result.tokens == 23
    assert result.perplexity == pytest.approx(math.exp(nll / 23), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / len(text), rel=1e-4)
    with pytest.raises(UserError, match="no token to predict"):
        text_perplexity(tiny_llama, tokenizer, "w1", window=9, add_bos=False)


def test_a_stop_gives_no_half_result(tiny_llama):
    texts = [Scored(ids=(1, 3, 4), answer_tokens=1)] * 4
    assert log_probabilities(tiny_llama, texts, PromptShare(batch_size=2, should_stop=lambda: True)) is None
