"""Agreement with the base's answers, compared with a loop over transformers' own `generate` and single texts."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bico_ds.commands.evaluate import main
from bico_ds.common.errors import UserError
from bico_ds.evaluation.agreement import agreement, answers_of_base
from bico_ds.evaluation.instructions import Instruction, read_instructions
from bico_ds.evaluation.request.asked import Request
from bico_ds.evaluation.request.run import run_request
from bico_ds.evaluation.scoring.share import PromptShare

NEW_TOKENS = 36


@pytest.fixture(scope="module")
def changed(tiny_llama) -> LlamaForCausalLM:
    """The base with other weights, near enough that some answers stay: what fine-tuning does."""
    model = copy.deepcopy(tiny_llama)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.003 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    draw = np.random.default_rng(17)
    return [
        Instruction(
            text=f"i{number}", line=number, ids=(1, *draw.integers(3, 43, size=draw.integers(1, 9)).tolist())
        )
        for number in range(12)
    ]


def _generated(model, instruction: Instruction) -> list[int]:
    ids = torch.tensor([instruction.ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2
    )
    answer = out[0, len(instruction.ids) :].tolist()
    return answer[: answer.index(2)] if 2 in answer else answer


def _alone(model, instruction: Instruction, answer: list[int]) -> tuple[float, int]:
    """The answer's log-probability and how many of its tokens are the likeliest, read by itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*instruction.ids, *answer]])).logits[0].double()
    before = logits[len(instruction.ids) - 1 : -1].log_softmax(-1)
    right = [before[position, token].item() for position, token in enumerate(answer)]
    return sum(right), sum(
        before.argmax(-1)[position].item() == token for position, token in enumerate(answer)
    )


def test_every_figure_is_that_of_a_loop_over_single_texts(tiny_llama, changed, tokenizer, instructions):
    share = PromptShare(batch_size=5)
    base = answers_of_base(tiny_llama, tokenizer, instructions, max_new_tokens=NEW_TOKENS, share=share)
    found = agreement(changed, tokenizer, instructions, base, share)
    theirs = [_generated(tiny_llama, instruction) for instruction in instructions]
    own = [_generated(changed, instruction) for instruction in instructions]
    assert [row["ids"] for row in base["rows"]] == theirs
    tokens = sum(map(len, theirs))
    forced = [_alone(changed, i, answer) for i, answer in zip(instructions, theirs, strict=True)]
    before = [_alone(tiny_llama, i, answer) for i, answer in zip(instructions, theirs, strict=True)]
    assert found["tokens"] == tokens
    assert found["agreement"] == pytest.approx(sum(matches for _, matches in forced) / tokens)
    assert found["base_agreement"] == pytest.approx(1.0)
    assert found["log_prob"] == pytest.approx(sum(x for x, _ in forced) / tokens, abs=1e-5)
    assert found["base_log_prob"] == pytest.approx(sum(x for x, _ in before) / tokens, abs=1e-5)
    assert found["log_prob_change"] == pytest.approx(found["log_prob"] - found["base_log_prob"])
    for n in (16, 32):
        same = np.mean([a[:n] == b[:n] for a, b in zip(own, theirs, strict=True)])
        assert found[f"identical_{n}"] == pytest.approx(same)
    assert 0 < found["identical_32"] < found["identical_16"] < 1 and found["agreement"] < 1, (
        "the models must differ, and not in all answers, or the test shows nothing"
    )
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high


def test_the_base_agrees_with_itself(tiny_llama, tokenizer, instructions):
    base = answers_of_base(tiny_llama, tokenizer, instructions, max_new_tokens=NEW_TOKENS)
    found = agreement(tiny_llama, tokenizer, instructions, base)
    assert [found[name] for name in ("agreement", "identical_16", "identical_32")] == [1.0, 1.0, 1.0]
    assert found["log_prob_change"] == 0.0


def test_instructions_are_asked_in_the_chat_template_and_without_one_as_they_are(
    tmp_path, tokenizer, bpe_tokenizer
):
    (tmp_path / "i.jsonl").write_text('{"instruction": "w3 w4"}\n\n{"instruction": "w5"}\n')
    options = {"add_bos": True, "new_tokens": 8, "context": None}
    chat = AutoTokenizer.from_pretrained(bpe_tokenizer)
    asked = read_instructions(tmp_path / "i.jsonl", chat, **options)
    assert [chat.decode(x.ids) for x in asked] == [
        f"<s>[user] {text}</s>[assistant] " for text in ("w3 w4", "w5")
    ]
    assert [x.line for x in asked] == [1, 3]
    plain = read_instructions(tmp_path / "i.jsonl", tokenizer, **options)
    assert [tokenizer.convert_ids_to_tokens(x.ids) for x in plain] == [["<s>", "w3", "w4"], ["<s>", "w5"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"instructions": "w1"}',
            r"i.jsonl:1: field 'instruction' is missing \(did you mean 'instructions'",
        ),
        ('{"instruction": " "}', r"i.jsonl:1: field 'instruction' must be a text that is not empty"),
        (json.dumps({"instruction": "w1 " * 60}), r"i.jsonl:1: the prompt has 61 tokens; with 8 new ones"),
    ],
)
def test_an_instruction_that_cannot_be_asked_is_named(tmp_path, tokenizer, line, message):
    (tmp_path / "i.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_instructions(tmp_path / "i.jsonl", tokenizer, add_bos=True, new_tokens=8, context=64)


@pytest.fixture(scope="module")
def world(tiny_llama, changed, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    for name, model in (("base", tiny_llama), ("model", changed)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"instruction": f"w{i} w{(7 * i) % 40}"}) for i in range(9)]
    (folder / "i.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _request(world, output, **changes) -> Request:
    values = {"model": world / "model", "base": world / "base", "instructions": world / "i.jsonl"}
    return Request(output=output, **(values | changes))


def _run(request: Request, should_stop=lambda: False) -> str | None:
    out = io.StringIO()
    share = PromptShare(batch_size=4, should_stop=should_stop)
    finished = run_request(request, share, Console(file=out, width=100))
    return out.getvalue() if finished else None


def test_the_command_goes_on_from_the_bases_answers_and_shows_the_agreement(world, tmp_path):
    polls = iter(range(10**6))
    stops_in_the_second_part = lambda: next(polls) > 130  # noqa: E731
    assert _run(_request(world, tmp_path / "r.json"), stops_in_the_second_part) is None
    half = json.loads((tmp_path / "r.json").read_text())
    assert list(half["identities"]) == ["base_answers/i.jsonl"]
    mark = half["base_answers"]["i.jsonl"]["rows"][0]["answer"] = (
        "a mark: what is there is not computed again"
    )
    (tmp_path / "r.json").write_text(json.dumps(half))
    shown = _run(_request(world, tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())["agreement"]["i.jsonl"]
    assert found["rows"][0]["base_answer"] == mark
    assert f"{found['agreement']:.3f}" in shown and f"{found['log_prob_change']:.3f}" in shown


def test_other_lengths_and_other_instructions_are_computed_anew(world, tmp_path):
    assert _run(_request(world, tmp_path / "r.json"))
    first = json.loads((tmp_path / "r.json").read_text())
    assert _run(_request(world, tmp_path / "r.json", max_new_tokens=7))
    second = json.loads((tmp_path / "r.json").read_text())
    assert second["agreement"]["i.jsonl"]["max_new_tokens"] == 7
    assert second["agreement"]["i.jsonl"]["tokens"] < first["agreement"]["i.jsonl"]["tokens"]
    other = tmp_path / "i.jsonl"
    other.write_text('{"instruction": "w1"}\n')
    assert _run(_request(world, tmp_path / "r.json", instructions=other))
    assert json.loads((tmp_path / "r.json").read_text())["agreement"]["i.jsonl"]["instructions"] == 1


def test_a_base_of_another_vocabulary_is_refused_before_weights_are_read(world, tmp_path, bpe_tokenizer):
    size = AutoTokenizer.from_pretrained(bpe_tokenizer).vocab_size
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=16, **small)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(bpe_tokenizer).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"--base .*other: another vocabulary than .*model has"):
        _run(_request(world, tmp_path / "r.json", base=tmp_path / "other"))


def test_instructions_without_a_base_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "m", "--instructions", "i.jsonl"])
    assert ended.value.code == 2 and "give --base too" in capsys.readouterr().err
