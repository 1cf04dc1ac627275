"""Texts sampled from a model: the model's own distribution, whatever is sampled beside them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.data.replay.sampling import sample_texts

BOS, EOS, VOCABULARY = 1, 2, 13
# Of a test on fresh seeds: the rate at which it fails by chance.
SIGNIFICANCE = 1e-7


def _model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Random weights, drawn anew, whose distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def _sample(model: LlamaForCausalLM, numbers: np.ndarray, seed: int, most_tokens: int) -> list[list[int]]:
    cpu = torch.device("cpu")
    return sample_texts(
        model, numbers, seed=seed, start=BOS, stops=(EOS,), most_tokens=most_tokens, device=cpu
    )


def _next(model: LlamaForCausalLM, texts: list[list[int]]) -> np.ndarray:
    """Exact probabilities of the next token, [texts, VOCABULARY], without a cache and in one full pass."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(texts)).logits[:, -1].double().softmax(-1).numpy()


def test_texts_of_three_tokens_come_as_often_as_the_model_says() -> None:
    """All of them, so a draw that is shared between positions or texts, a cut tail or a temperature shows."""
    model = _model()
    first = _next(model, [[BOS]])[0]
    second = _next(model, [[BOS, token] for token in range(VOCABULARY)])
    expected = first[:, None] * second
    expected[EOS] = 0
    expected[EOS, 0] = first[EOS]  # ended: no third token
    count = 20_000
    counts = np.zeros_like(expected)
    for text in _sample(model, np.arange(count), random.getrandbits(60), 3):
        assert text[0] == BOS
        counts[text[1], text[2] if len(text) > 2 else 0] += 1
    order = np.argsort(expected, axis=None)
    cells, seen = count * expected.ravel()[order], counts.ravel()[order]
    assert not seen[cells == 0].any()
    rare = np.searchsorted(np.cumsum(cells), 20)  # joined to one cell
    cells = np.append(cells[rare + 1 :], cells[: rare + 1].sum())
    seen = np.append(seen[rare + 1 :], seen[: rare + 1].sum())
    assert len(cells) > 20
    assert stats.chisquare(seen, cells).pvalue > SIGNIFICANCE


def test_a_text_depends_on_its_number_and_the_seed_alone() -> None:
    model, seed = _model(torch.float64), random.getrandbits(60)
    together = _sample(model, np.arange(48), seed, 24)
    order = np.random.default_rng(seed).permutation(48)
    for numbers in np.split(order, [1, 8, 31]):
        assert _sample(model, numbers, seed, 24) == [together[number] for number in numbers]
    assert _sample(model, np.arange(48), seed + 1, 24) != together


def test_texts_end_with_their_stop_token_or_are_cut_without_one() -> None:
    texts = _sample(_model(), np.arange(300), random.getrandbits(60), 12)
    for text in texts:
        assert EOS not in text[:-1]
        assert len(text) == 12 or text[-1] == EOS
    assert any(len(text) == 12 and text[-1] != EOS for text in texts)
    assert any(text[-1] == EOS for text in texts)


@pytest.mark.parametrize("start", [EOS, 5])
def test_a_stop_token_may_begin_texts(start: int) -> None:
    cpu = torch.device("cpu")
    texts = sample_texts(
        _model(), np.arange(50), seed=3, start=start, stops=(EOS, 7), most_tokens=6, device=cpu
    )
    assert all(text[0] == start and len(text) > 1 for text in texts)
    assert not {EOS, 7} & {token for text in texts for token in text[1:-1]}
