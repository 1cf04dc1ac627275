"""Chats come out as transformers writes them, whatever form contents and template have, and nothing is lost silently."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.chats import ChatTemplate
from bico_ds.data.prepare.records import BadRecord
from bico_ds.data.tokenizer import load_tokenizer
from tests.data.prepare.ingesting import all_documents, ingest_files, write_jsonl

LOOP = (
    "{%% for m in messages %%}[{{ m.role }}] %s\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}[assistant] {%% endif %%}"
)
PARTS = (
    "{% for p in m.content %}{% if 'image_url' in p %}<IMG>{% elif p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "adds strings": "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "writes anything": LOOP % "{{ m.content }}",
    "writes json": LOOP % "{{ m.content | tojson }}",
    "trims": LOOP % "{{ m.content | trim }}",
    "writes strings, and nothing else": LOOP % "{% if m.content is string %}{{ m.content }}{% endif %}",
    "writes parts, and nothing else": LOOP % PARTS,
    "writes the first part": LOOP % "{{ m.content[0].text }}",
    "writes both": LOOP % ("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
    "writes a system's string and others' parts": LOOP
    % ("{% if m.role == 'system' %}{{ m.content | trim }}{% else %}" + PARTS + "{% endif %}"),
}


def _tokenizer(source: str, folder: Path, template: str) -> str:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def _parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def _chat(*contents: Any) -> list[dict[str, Any]]:
    roles = ("system", "user", "assistant", "user", "assistant")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_part_is_written_as_the_string_and_no_content_is_lost(
    name: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    template = ChatTemplate(load_tokenizer(_tokenizer(bpe_tokenizer, tmp_path / "t", TEMPLATES[name])))
    rng = random.Random()
    for _ in range(20):
        texts = [
            f"w{rng.random()} 'quoted' {'text' * rng.randrange(3)}." for _ in range(rng.choice((2, 3, 5)))
        ]
        want = "".join(f"[{m['role']}] {m['content']}" for m in _chat(*texts))
        contents = [_parts(text) if rng.random() < 0.5 else text for text in texts]
        for given in (texts, [_parts(text) for text in texts], contents):
            text, prompt, left_out, *_ = template.render(_chat(*given))
            assert left_out == 0
            assert "'type'" not in text and '"type"' not in text
            if name == "writes json":
                assert all(word[:15] in text for word in texts)
            else:
                assert text.replace("\n", "") == want
            if _chat(*given)[-1]["role"] == "assistant":
                assert text[prompt:].strip().strip('"') and texts[-1][:15] in text[prompt:]


def test_a_template_that_knows_parts_is_given_them_as_they_are_else_they_are_joined(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    chat = _chat("system", _parts("one", "two"), _parts("three"))
    written = {}
    for name in TEMPLATES:
        folder = _tokenizer(bpe_tokenizer, tmp_path / name, TEMPLATES[name])
        written[name] = ChatTemplate(load_tokenizer(folder)).render(chat).text
        if name == "writes both":
            by_transformers = load_tokenizer(folder).apply_chat_template(chat, tokenize=False)
            assert written[name] == by_transformers
    assert (
        "[user] onetwo" in written["writes both"]
        and "[user] onetwo" in written["writes parts, and nothing else"]
    )
    for name in ("adds strings", "writes anything", "trims", "writes the first part"):
        assert "[user] one two" in written[name]  # as `transformers serve` gives parts to a text model


def test_rows_of_a_table_have_the_columns_of_all_parts_and_only_text_reaches_the_template(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    part = {"type": "text", "text": "hi", "image_url": None}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [part], "name": None},
                {"role": "assistant", "content": [part]},
            ]
        }
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenizer = _tokenizer(bpe_tokenizer, tmp_path / "t", TEMPLATES["writes both"])
    ingest_files(tmp_path / "a.parquet", tokenizer, tmp_path / "s", messages_field="messages")
    (document,) = all_documents(tmp_path / "s")
    text = load_tokenizer(tokenizer).decode(document.token_ids)
    assert "<IMG>" not in text and text.count("hi") == 2


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"a": 1}}}
BAD: list[tuple[str, Any, str]] = [
    ("null", None, "message 2 lacks 'role' or 'content'"),
    ("number", 5, "content of message 2 must be text, found int"),
    ("boolean", True, "must be text, found bool"),
    ("object", {"type": "text", "text": "x"}, "must be text, found dict"),
    (
        "image",
        [{"type": "image_url", "image_url": {"url": "x"}}],
        "message 2 holds a part of type 'image_url'",
    ),
    ("image beside text", [*_parts("x"), {"type": "image"}], "message 2 holds a part of type 'image'"),
    ("no type", [{"text": "x"}], "message 2 holds a part of type None"),
    ("strings", ["x", "y"], "message 2 holds str"),
    ("nested", [_parts("x")], "message 2 holds list"),
    ("no text", [{"type": "text"}], "a part of message 2 has no string as its 'text'"),
    ("null text", [{"type": "text", "text": None}], "a part of message 2 has no string as its 'text'"),
    ("surrogate", "hi \ud83d", "lone surrogate"),
    ("surrogate in a part", [{"type": "text", "text": "\udc00"}], "lone surrogate"),
]


@pytest.mark.parametrize(
    ("name", "content", "problem"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_contents_that_are_no_text_are_bad_records_named_with_line_and_skipped_on_request(
    name: str, content: Any, problem: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    good = [{"role": "user", "content": "fine"}, {"role": "assistant", "content": "yes"}]
    bad = [good[0], {"role": "assistant", "content": content}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": good}, {"messages": bad}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as caught:
        ingest_files(file, bpe_tokenizer, tmp_path / "s", messages_field="messages")
    assert problem in str(caught.value)
    ingest_files(file, bpe_tokenizer, tmp_path / "s", messages_field="messages", on_error="skip")
    assert len(all_documents(tmp_path / "s")) == 1


def test_a_call_of_a_tool_is_written_or_refused(tmp_path: Path, bpe_tokenizer: str) -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    calls = "{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}"
    knows = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    for number, (template, written) in enumerate(
        ((knows, "?<look_up>"), (TEMPLATES["writes anything"], None))
    ):
        template = ChatTemplate(load_tokenizer(_tokenizer(bpe_tokenizer, tmp_path / str(number), template)))
        if written is not None:
            assert template.render(chat).text == written
        else:
            with pytest.raises(BadRecord, match="leaves out a tool call of message 2"):
                template.render(chat)


@pytest.mark.parametrize("reply", ["", " \n", [], _parts("", " ")])
def test_a_last_reply_without_text_is_a_bad_record_as_a_completion_is(tmp_path, bpe_tokenizer, reply):
    template = ChatTemplate(
        load_tokenizer(Path(_tokenizer(bpe_tokenizer, tmp_path / "t", TEMPLATES["writes both"])))
    )
    with pytest.raises(BadRecord, match="the last reply, message 3, has no text"):
        template.render(_chat("s", "who?", reply))


def test_a_content_that_the_template_leaves_out_is_counted_with_the_first_place(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    template = LOOP.replace("in messages", "in messages if m.role != 'system'") % "{{ m.content }}"
    tokenizer = _tokenizer(bpe_tokenizer, tmp_path / "t", template)
    chats = [
        _chat("rules", "a", "b")[1:],
        _chat("rules", "a", "b"),
        _chat("", "a", "b"),
        _chat("x", "a", "b"),
    ]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    report = ingest_files(file, tokenizer, tmp_path / "s", messages_field="messages")
    (warning,) = report.warnings
    assert warning.startswith("2 documents have a message whose content the chat template leaves out")
    assert f"{file}:2, message 1" in warning
    assert f"warning      {warning}" in (tmp_path / "s" / "report.txt").read_text()


SYSTEM_IN_THE_LAST_QUESTION = (  # Mistral-7B-Instruct-v0.3
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LAST_TWO = "{% for m in messages[-2:] %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
PREFILLED = (  # an empty thought before the last reply only, as Qwen3 writes it
    "{% for m in messages %}[{{ m.role }}] {% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "completion"),
    [
        (SYSTEM_IN_THE_LAST_QUESTION, _chat("rules", "who?", "me"), "me</s>"),
        (SYSTEM_IN_THE_LAST_QUESTION, _chat("rules", _parts("who?"), _parts("me")), "me</s>"),
        (LAST_TWO, _chat("s", "a", "b", "who?", "me"), "me\n"),
        (PREFILLED, [*_chat("s", "who?", "first"), {"role": "assistant", "content": "me"}], "me\n"),
    ],
)
def test_questions_are_no_completion_where_a_reply_changes_how_they_are_written(
    template: str, chat: list[dict[str, Any]], completion: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    folder = _tokenizer(bpe_tokenizer, tmp_path / "t", template)
    text, prompt, *_ = ChatTemplate(load_tokenizer(folder)).render(chat)
    assert text[prompt:] == completion


THOUGHT = "<think>\nHmm: 'a & b'\n</think>\n\nme, née \"X\""


@pytest.mark.parametrize("name", [*TEMPLATES, "escapes", "prompts a thought"])
def test_a_reply_that_is_written_completely_is_not_counted_as_shortened(
    name: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    more = {
        "escapes": LOOP % "{{ m.content | e }}",
        "prompts a thought": (LOOP % "{{ m.content }}").replace("[assistant] ", "[assistant] <think>\n"),
    }
    folder = _tokenizer(bpe_tokenizer, tmp_path / "t", (TEMPLATES | more)[name])
    template = ChatTemplate(load_tokenizer(folder))
    for reply in (THOUGHT, _parts(THOUGHT)):
        text, _, left_out, *_ = template.render(_chat("s", "who?", reply))
        assert left_out == 0 and "text" not in text


def test_a_reply_of_which_the_template_leaves_out_the_thought_is_counted(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    shortened = LOOP % "{{ m.content.split('</think>')[-1] }}"  # DeepSeek-R1's
    tokenizer = _tokenizer(bpe_tokenizer, tmp_path / "t", shortened)
    chats = [_chat("s", "who?", "me"), _chat("s", "who?", THOUGHT), _chat("s", "who?", _parts(THOUGHT))]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    (warning,) = ingest_files(file, tokenizer, tmp_path / "s", messages_field="messages").warnings
    assert warning.startswith("2 documents have") and "or a part of the last reply" in warning
    assert f"{file}:2, message 3" in warning


def _with_templates(source: str, folder: Path, **templates: str) -> str:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / place).write_text(template)
    return str(folder)


def test_of_several_templates_the_default_is_used_said_and_kept_with_the_store(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    templates = {"default": TEMPLATES["writes anything"], "rag": "RAG", "tool_use": "TOOLS"}
    several = _with_templates(bpe_tokenizer, tmp_path / "several", **templates)
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": _chat("s", "u", "a")}])
    ingest_files(file, several, tmp_path / "s", messages_field="messages")
    (document,) = all_documents(tmp_path / "s")
    assert "[user] u" in load_tokenizer(several).decode(document.token_ids)
    assert "template     'default', of default, rag, tool_use" in (tmp_path / "s" / "report.txt").read_text()
    assert load_tokenizer(tmp_path / "s" / "tokenizer").chat_template == templates


def test_several_templates_without_a_default_are_refused_before_any_record_is_read(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    several = _with_templates(bpe_tokenizer, tmp_path / "several", rag="RAG", tool_use="TOOLS")
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\), and none is the default"):
        ingest_files(
            tmp_path / "a.jsonl", several, tmp_path / "s", messages_field="messages", on_error="skip"
        )


SPECIAL = {
    "end": {"text": "the end</s> and on"},
    "begin": {"text": "<s>as a template begins"},
    "prompt": {"q": "who</s>", "a": " me"},
    "completion": {"q": "who", "a": " </s>me"},
    "message": {"m": [{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}]},
    "reply": {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<s>"}]},
    "part": {
        "m": [{"role": "user", "content": _parts("a", "b</s>c")}, {"role": "assistant", "content": "b"}]
    },
}
CLEAN: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "< s> and < /s> and ordinary text"}],
    "q": [{"q": "who", "a": " me"}],
    "m": [{"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_written_out_are_counted_and_the_first_is_named(
    name: str, tmp_path: Path, bpe_tokenizer: str
) -> None:
    record = SPECIAL[name]
    kind = next(iter(record))
    fields: dict[str, dict[str, Any]] = {
        "text": {}, "q": {"prompt_field": "q", "completion_field": "a"}, "m": {"messages_field": "m"}
    }  # fmt: skip
    clean = CLEAN[kind]
    file = write_jsonl(tmp_path / "a.jsonl", [*clean, *clean, record, *clean, record])
    report = ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=200, **fields[kind])
    (warning,) = report.warnings
    assert warning.startswith("2 documents have special tokens written out")
    token = "<s>" if "<s>" in str(record) else "</s>"
    assert f"{file}:3, {token!r}" in warning
    assert f"warning      {warning}" in (tmp_path / "s" / "report.txt").read_text()
    assert (
        ingest_files(write_jsonl(file, clean), bpe_tokenizer, tmp_path / "c", **fields[kind]).warnings == []
    )


def test_an_unknown_word_is_no_special_token_unless_it_is_written_out(
    tmp_path: Path, word_tokenizer: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "today nobodyknowsthis ."}, {"text": "today <unk> ."}])
    (warning,) = ingest_files(file, word_tokenizer, tmp_path / "s").warnings
    assert warning.startswith("1 documents") and ":2, '<unk>'" in warning
