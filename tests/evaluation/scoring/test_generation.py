from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import GenerationConfig

from bico_ds.common.errors import UserError
from bico_ds.evaluation.scoring.generation import (
    beyond_greedy,
    check_lengths,
    encode_prompts,
    generate_greedy,
    stop_ids,
)
from bico_ds.evaluation.scoring.likelihood import encode_answers
from bico_ds.evaluation.scoring.share import PromptShare, shared_batches


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    draw, words = random.Random(5), [f"w{i}" for i in range(40)]
    return encode_prompts(tokenizer, [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(23)])


def test_batched_generation_equals_hugging_face_one_prompt_at_a_time(tiny_llama, tokenizer, prompts):
    ours = generate_greedy(tiny_llama, tokenizer, prompts, max_new_tokens=12, share=PromptShare(batch_size=8))
    ended = 0
    for ids, text in zip(prompts, ours, strict=True):
        row = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        ended += 2 in row.tolist()
        assert text == tokenizer.decode(row, skip_special_tokens=True)
    assert 0 < ended < len(prompts)


def test_a_padding_token_that_the_model_does_not_embed_changes_no_answer(tiny_llama, tokenizer, prompts):
    share, padded = PromptShare(batch_size=8), copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == tiny_llama.config.vocab_size
    answers = [
        generate_greedy(tiny_llama, one, prompts, max_new_tokens=5, share=share)
        for one in (padded, tokenizer)
    ]
    assert answers[0] == answers[1]


def test_prompts_begin_with_bos_as_in_training(tokenizer):
    assert encode_prompts(tokenizer, ["w0 w1"]) == [[1, 3, 4]]
    assert encode_prompts(tokenizer, ["w0 w1"], add_bos=False) == [[3, 4]]


def test_a_bos_that_is_written_out_is_not_doubled_as_in_training(tokenizer):
    assert encode_prompts(tokenizer, ["<s> w0 w1"]) == [[1, 3, 4]]
    assert encode_prompts(tokenizer, ["<s> w0 w1"], add_bos=False) == [[1, 3, 4]]
    (scored,) = encode_answers(tokenizer, ["<s> w0"], [" w1"])
    assert (scored.ids, scored.answer_tokens) == ((1, 3, 4), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_run_equally_many_batches_and_together_every_prompt(prompts, world_size):
    shares = [
        shared_batches(prompts[:5], PromptShare(rank=rank, world_size=world_size, batch_size=2))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {i for share in shares for batch in share for i in batch} == set(range(5))
    assert all(1 <= len(batch) <= 2 for share in shares for batch in share)


def test_the_model_stays_in_its_mode_and_a_stop_ends_the_work(tiny_llama, tokenizer, prompts):
    tiny_llama.train()
    polls = iter([False, False, True])
    share = PromptShare(batch_size=8, should_stop=lambda: next(polls))
    stopped = generate_greedy(tiny_llama, tokenizer, prompts, max_new_tokens=12, share=share)
    assert stopped is None
    assert tiny_llama.training
    tiny_llama.eval()


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(
        UserError, match=r"t.jsonl:4: the prompt has 60 tokens; with 8 new ones .* context of 64"
    ):
        check_lengths([[1] * 60], new_tokens=8, context=64, names=["t.jsonl:4"])
    with pytest.raises(UserError, match="no token"):
        check_lengths([[]], new_tokens=8, context=64, names=["t.jsonl:4"])


def test_answers_end_at_the_tokens_of_the_generation_config_as_in_generate(tiny_llama, tokenizer, prompts):
    kept = tiny_llama.generation_config
    try:
        for stops in ([7, 2], [30, 31, 32, 33], 9):
            tiny_llama.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=2)
            assert stop_ids(tiny_llama.generation_config, tokenizer) == ([9] if stops == 9 else stops)
            ours = generate_greedy(
                tiny_llama, tokenizer, prompts, max_new_tokens=12, share=PromptShare(batch_size=8)
            )
            for ids, text in zip(prompts, ours, strict=True):
                row = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[
                    0, len(ids) :
                ]
                row = [
                    token
                    for token in row.tolist()
                    if token not in stop_ids(tiny_llama.generation_config, tokenizer)
                ]
                assert text == tokenizer.decode(row, skip_special_tokens=True)
    finally:
        tiny_llama.generation_config = kept


def test_without_stop_tokens_in_the_generation_config_the_tokenizers_eos_counts(tokenizer):
    assert stop_ids(GenerationConfig(), tokenizer) == [2]


def test_settings_that_change_greedy_answers_are_found_and_those_of_sampling_only_where_it_is_on():
    sampling = {
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "num_beams": 1,
    }
    assert beyond_greedy(GenerationConfig(**sampling)) == {}
    assert beyond_greedy(GenerationConfig(**(sampling | {"repetition_penalty": 1.3}))) == {
        "repetition_penalty": 1.3
    }
    assert beyond_greedy(GenerationConfig(**(sampling | {"do_sample": True}))) == {"do_sample": True}
