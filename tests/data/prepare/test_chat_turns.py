"""All replies of a chat are found in the store's tokens, whatever its template, and nothing else is taken for one.

Two oracles: templates that mark replies themselves, by transformers' `{% generation %}`; and patterns that look for the
replies in the text, written for each template by hand.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.data.loading.sequences import cut_store
from bico_ds.data.reply_ends import unstopped_replies
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.training.dry_run import dry_run
from tests.data.prepare.ingesting import all_documents, contents, ingest_files, write_jsonl

HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
# (template, end of a turn, a pattern whose group 1 is a reply in the text, as many at the end of the text may be cut off)
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}" + HEADER + "{% generation %}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
        + HEADER
        + "{{ m.content | trim + '<|eot_id|>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    ),
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    ),
    # Writes a system prompt of its own where a chat has none.
    "qwen2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    ),
    # Puts the system prompt into the last question: what is before a reply changes with what comes after it.
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (ns.system if m == users[-1] else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}",
        "</s>",
        r"\[/INST\](.*?</s>)",
    ),
    # Ends every chat with an EOS, which begins with the character that the next turn's special token begins with.
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        "<|end|>",
        r"<\|assistant\|>\n(.*?<\|end\|>(?:\n</s>$)?)",
    ),
    # Its author marks nothing; a reply's thoughts are shown in the last turn alone, and its prompt does not write them.
    "thinks last": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    ),
}
MARKED = [name for name, (template, *_) in TEMPLATES.items() if "{% generation" in template]
SPECIAL = [
    *("<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]


@pytest.fixture
def tokenizer_of(tmp_path, bpe_tokenizer):
    def write(name: str, *, eos: str | None = None) -> str:
        tokenizer = load_tokenizer(Path(bpe_tokenizer))
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        # Else char_to_token knows no spaces, and transformers finds no reply that begins with one.
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.chat_template = TEMPLATES[name][0]
        if eos is not None:
            tokenizer.eos_token = eos
        folder = tmp_path / f"tokenizer-{name.replace(' ', '-')}-{eos is not None}"
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


def random_chats(count: int, *, seed: int | None = None) -> list[list[dict[str, Any]]]:
    """Chats of one to four questions, with a system prompt or without, some of them without a last reply."""
    rng, chats = random.Random(seed), []
    for _ in range(count):
        chat = [{"role": "system", "content": "Be brief."}] * (rng.random() < 0.5)
        for _ in range(rng.randint(1, 4)):
            text = f"w{rng.random()} assistant\n [/INST naïve 北京 🙂 {'again ' * rng.randrange(4)}."
            chat += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text[: rng.randint(3, len(text))] + "!"},
            ]
        chats.append(chat[: len(chat) - (rng.random() < 0.2)])
    return chats


def store_of(chats: list[Any], tokenizer: str, folder: Path, **settings: Any):
    file = write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    settings = {"messages_field": "messages", "add_bos": False, "add_eos": False} | settings
    ingest_files(file, tokenizer, folder / "store", force=True, **settings)
    return all_documents(folder / "store")


@pytest.mark.parametrize("name", MARKED)
def test_the_replies_are_those_that_a_template_marks_itself(name, tmp_path, tokenizer_of):
    chats, folder = random_chats(40), tokenizer_of(name)
    tokenizer = load_tokenizer(Path(folder))
    for chat, document in zip(chats, store_of(chats, folder, tmp_path), strict=True):
        marked = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert document.token_ids.tolist() == marked["input_ids"]
        assert document.is_reply.astype(int).tolist() == marked["assistant_masks"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_replies_are_those_that_a_pattern_finds_in_the_text(name, tmp_path, tokenizer_of):
    _, _, pattern = TEMPLATES[name]
    chats, folder = random_chats(40), tokenizer_of(name)
    tokenizer = load_tokenizer(Path(folder))
    documents = store_of(chats, folder, tmp_path)
    for chat, document in zip(chats, documents, strict=True):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [found.span(1) for found in re.finditer(pattern, text, re.DOTALL)]
        assert len(spans) == sum(m["role"] == "assistant" for m in chat)
        expected = [any(s <= a and b <= e for s, e in spans) for a, b in encoding["offset_mapping"]]
        assert document.is_reply.tolist() == expected
        last = max(spans, default=(0, 0)) if chat[-1]["role"] == "assistant" else (len(text), len(text))
        assert document.prompt_length == sum(b <= last[0] for _, b in encoding["offset_mapping"])
    assert "warning" not in (tmp_path / "store" / "report.txt").read_text()


def test_an_eos_that_is_added_belongs_to_the_last_reply_with_what_leads_to_it_and_bos_to_none(
    tmp_path, tokenizer_of
):
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "Hi"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No."))
    ]
    folder = tokenizer_of("chatml")
    tokenizer = load_tokenizer(Path(folder))
    asked, answered = store_of([chat[:3], chat], folder, tmp_path, add_bos=True, add_eos=True)
    of = lambda document: tokenizer.decode(document.token_ids[document.is_reply])  # noqa: E731
    assert of(asked) == "Yes.<|im_end|>", "a question has no reply, and the EOS after it is none"
    assert of(answered) == "Yes.<|im_end|>No.<|im_end|>\n</s>"
    assert not answered.is_reply[0] and answered.token_ids[0] == tokenizer.bos_token_id


def test_the_loss_is_on_all_replies_or_on_the_last_and_pieces_have_what_the_whole_has(tmp_path, tokenizer_of):
    folder, chats = tokenizer_of("llama3"), random_chats(30)
    documents = store_of(chats, folder, tmp_path)
    targets = {}
    for loss_on in ("all", "completion", "replies"):
        objective = NextTokenPrediction(spec=NtpSpec(loss_on=loss_on))
        targets[loss_on] = objective.build(documents, BatchKey(seed=1, epoch=0)).targets.tolist()
    assert targets["replies"] == documents.token_ids[documents.is_reply].tolist()
    assert len(targets["completion"]) < len(targets["replies"]) < len(targets["all"])
    store = TokenStore.open(tmp_path / "store")
    cut = cut_store(store, longest=17, overlong="split")
    pieces = cut.read(np.arange(len(cut)), store, source=0)
    assert pieces.is_reply.tolist() == documents.is_reply.tolist()


def test_a_store_without_replies_stays_readable_and_is_refused_where_they_are_asked_for(
    tmp_path, tokenizer_of
):
    folder = tokenizer_of("chatml")
    store_of(random_chats(5), folder, tmp_path)
    old = contents(tmp_path / "store")
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    ingest_files(text, folder, tmp_path / "plain")
    plain, chats = TokenStore.open(tmp_path / "plain"), TokenStore.open(tmp_path / "store")
    assert (plain.has_replies, chats.has_replies) == (False, True)
    assert "reply_tokens.bin" in old and plain.whole(np.arange(1)).is_reply is None
    objective = NextTokenPrediction(spec=NtpSpec(loss_on="replies"))
    objective.check(chats)
    with pytest.raises(
        UserError, match=r"objectives\[0\]\.loss_on is 'replies', but .* prepare it \(again\)"
    ):
        objective.check(plain)
    (tmp_path / "store" / "reply_tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"reply_tokens\.bin has 0 bytes"):
        TokenStore.open(tmp_path / "store")


def test_the_fingerprint_of_chats_is_that_of_before_and_names_no_replies(tmp_path, tokenizer_of):
    """So that runs on stores of before resume, also where their cache is made again."""
    store_of(random_chats(5, seed=3), tokenizer_of("chatml"), tmp_path)
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert "reply_tokens.bin" not in {*manifest.file_sizes, *manifest.checksums}
    assert manifest.replies_checksum == manifest.further_checksums["reply_tokens.bin"]
    without = {k: v for k, v in manifest.further_checksums.items() if k != "reply_tokens.bin"}
    assert (
        type(manifest)(**{**manifest.__dict__, "further_checksums": without}).fingerprint
        == manifest.fingerprint
    )


def test_a_turn_that_a_template_hides_is_counted_and_left_out(tmp_path, tokenizer_of, bpe_tokenizer):
    folder = tokenizer_of("chatml")
    hides = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
        "[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}"
    )
    (Path(folder) / "chat_template.jinja").write_text(hides)
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "Hi"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No."))
    ]
    (document,) = store_of([chat], folder, tmp_path)
    assert (
        load_tokenizer(Path(folder)).decode(document.token_ids[document.is_reply]).strip()
        == "[assistant] No."
    )
    assert (
        "1 documents have an assistant's turn that is not found"
        in (tmp_path / "store" / "report.txt").read_text()
    )


@pytest.mark.parametrize(
    ("name", "eos", "stops"),
    [("chatml", None, False), ("chatml", "<|im_end|>", True), ("mistral", None, True)],
)
def test_a_turn_s_end_that_does_not_stop_generation_is_warned_of(name, eos, stops, tmp_path, tokenizer_of):
    folder = tokenizer_of(name, eos=eos)
    tokenizer = load_tokenizer(Path(folder))
    store_of([chat for chat in random_chats(60) if len(chat) > 3], folder, tmp_path)
    store = TokenStore.open(tmp_path / "store")
    warning = unstopped_replies("chats", store, tokenizer, [tokenizer.eos_token_id])
    if stops:
        assert warning is None
    else:
        assert (
            warning is not None and "replies end in <|im_end|> (id " in warning and "stops at </s>" in warning
        )
        assert (
            unstopped_replies(
                "chats",
                store,
                tokenizer,
                [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
            )
            is None
        )


def test_a_dry_run_trains_on_replies_and_says_where_generation_would_not_stop(
    tmp_path, tokenizer_of, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tokenizer_of("chatml")
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in random_chats(60) if len(chat) > 3])
    words = [
        f"model.tokenizer={folder}", f"model.config.vocab_size={len(load_tokenizer(Path(folder)))}", "data.capacity=512",
        "data.sources=[{files: [chats.jsonl], messages_field: messages, name: chats}]",
        "objectives=[{kind: ntp, probability: 0.5, loss_on: replies}, "
        "{kind: bico, probability: 0.5, mask: {eligible: replies}}]",
    ]  # fmt: skip
    dry_run(load_recipe("tiny_base", words))
    shown = capsys.readouterr().out
    assert "bico 50% (15% masked of the replies, by token)" in shown
    assert "warning: source 'chats': " in shown and "replies end in <|im_end|> (id " in shown
