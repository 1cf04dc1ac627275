"""Tokens, prompts, entities and word starts are those of the text, as transformers tokenizes it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

from bico_ds.data.tokenizer import load_tokenizer
from tests.data.prepare.ingesting import TEXTS, all_documents, ingest_files, write_jsonl


def test_documents_are_what_transformers_tokenizes_between_bos_and_eos(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    ingest_files(
        write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), bpe_tokenizer, tmp_path / "s"
    )
    tokenizer = load_tokenizer(bpe_tokenizer)
    for document, text in zip(all_documents(tmp_path / "s"), TEXTS, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert document.token_ids.tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def test_the_prompt_ends_where_the_completion_begins(tmp_path: Path, bpe_tokenizer: str) -> None:
    rng = random.Random(5)
    cuts = [rng.randrange(0, len(text) - 1) for text in TEXTS]
    records = [
        {"q": t[:c], "a": t[c:], "who": f"person {i % 3}"}
        for i, (t, c) in enumerate(zip(TEXTS, cuts, strict=True))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    ingest_files(
        file, bpe_tokenizer, tmp_path / "s", prompt_field="q", completion_field="a", group_field="who"
    )
    tokenizer = load_tokenizer(bpe_tokenizer)
    documents = list(all_documents(tmp_path / "s"))
    for document, text, cut in zip(documents, TEXTS, cuts, strict=True):
        assert tokenizer.decode(document.token_ids, skip_special_tokens=True) == text
        if cut == 0:
            assert document.prompt_length == 0
            continue
        prompt, longer = (document.token_ids[1 : document.prompt_length + extra] for extra in (0, 1))
        assert text[:cut].startswith(tokenizer.decode(prompt).rstrip("�"))
        assert len(tokenizer.decode(prompt).rstrip("�")) <= cut < len(tokenizer.decode(longer)) + 1
    assert [d.group for d in documents[:3]] == [d.group for d in documents[3:6]]
    assert len({d.group for d in documents}) == 3


def test_entities_become_the_tokens_that_touch_them(tmp_path: Path, bpe_tokenizer: str) -> None:
    text = "The café of Ana María Ruiz opened in 北京."
    spans = [[12, 26], [4, 8], [37, 39]]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "spans": spans}, {"text": "none", "spans": []}])
    ingest_files(file, bpe_tokenizer, tmp_path / "s", entities_field="spans")
    first, second = all_documents(tmp_path / "s")
    decode = load_tokenizer(bpe_tokenizer).decode
    assert [decode(first.token_ids[a:b]).strip() for a, b in first.entity_spans] == [
        "Ana María Ruiz",
        "café",
        "北京",
    ]
    assert len(second.entity_spans) == 0


def test_words_start_after_white_space(tmp_path: Path, bpe_tokenizer: str, word_tokenizer: str) -> None:
    text = "Ünbelievable  words,\nand more"
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    ingest_files(file, bpe_tokenizer, tmp_path / "s", add_bos=False, add_eos=False)
    (document,) = all_documents(tmp_path / "s")
    words = np.split(document.token_ids, np.flatnonzero(document.word_starts)[1:])
    decoded = [load_tokenizer(bpe_tokenizer).decode(word) for word in words]
    assert [word.strip() for word in decoded if word.strip()] == text.split()
    ingest_files(
        write_jsonl(tmp_path / "b.jsonl", [{"text": "today | so | ."}]), word_tokenizer, tmp_path / "w"
    )
    assert all_documents(tmp_path / "w").word_starts.all()


def test_messages_are_rendered_once_and_the_last_reply_is_the_completion(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me.")]
    chats = [[{"role": r, "content": c} for r, c in turns[:n]] for n in (4, 3)]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    ingest_files(file, bpe_tokenizer, tmp_path / "s", messages_field="messages")
    decode = load_tokenizer(bpe_tokenizer).decode
    chat, open_end = all_documents(tmp_path / "s")
    assert decode(chat.token_ids).startswith("<s>[user] Hi</s>[assistant]")  # one BOS, not two
    assert decode(chat.token_ids[chat.prompt_length :]).strip() == "Me.</s>"
    assert open_end.prompt_length == len(open_end.token_ids)  # no reply: nothing to learn from
    report = (tmp_path / "s" / "report.txt").read_text()
    assert "prompts      2 of 2 documents have one\nno reply     1 documents" in report


def test_a_template_that_ends_with_eos_and_a_line_end_gets_no_second_eos(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    shutil.copytree(bpe_tokenizer, tmp_path / "t")
    template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' }}\n"
    )
    (tmp_path / "t" / "chat_template.jinja").write_text(template + "{% endfor %}")
    chats = [[("user", "Hi"), ("assistant", "Me.")], [("user", "Hi"), ("user", "Me.")]]
    records = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    ingest_files(
        write_jsonl(tmp_path / "a.jsonl", records),
        str(tmp_path / "t"),
        tmp_path / "s",
        messages_field="messages",
    )
    tokenizer = load_tokenizer(bpe_tokenizer)
    texts = [tokenizer.decode(document.token_ids) for document in all_documents(tmp_path / "s")]
    assert texts == ["<s>Hi\nMe.</s>\n", "<s>Hi\nMe.\n</s>"]
