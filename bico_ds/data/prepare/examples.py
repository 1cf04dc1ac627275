"""Rows to texts: which fields make a document, and where its prompt ends."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.data.prepare.shards import BadRow

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How rows become documents, and which of them stay. Raises `UserError` for options that exclude each other."""

    text_field: str = "text"
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    group_field: str | None = None
    entities_field: str | None = None
    text_by: Literal["line", "file"] = "line"
    add_bos: bool = True
    add_eos: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    vocab_size: int | None = None  # of the model, where it is smaller than the tokenizer's
    deduplicate: bool = False
    held_out: float = 0.0
    seed: int = 1  # of the held-out split

    def __post_init__(self) -> None:
        if (self.prompt_field is None) != (self.completion_field is None):
            raise UserError("--prompt-field and --completion-field go together")
        if self.messages_field and (self.prompt_field or self.entities_field):
            raise UserError("--messages-field excludes --prompt-field and --entities-field")
        if self.text_field != "text" and (self.prompt_field or self.messages_field):
            raise UserError("--text-field excludes --prompt-field and --messages-field: one makes the text")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out must be a share in [0, 1), found {self.held_out}")

    @property
    def needs_digests(self) -> bool:
        """Whether documents must be told apart by their text."""
        return self.deduplicate or (self.held_out > 0 and self.group_field is None)

    @cached_property
    def columns(self) -> list[str]:
        """The fields that a row must have; the first one receives the text of plain-text files."""
        if self.messages_field:
            texts = [self.messages_field]
        elif self.prompt_field and self.completion_field:
            texts = [self.prompt_field, self.completion_field]
        else:
            texts = [self.text_field]
        return [*texts, *filter(None, (self.group_field, self.entities_field))]


class Example(NamedTuple):  # made once per row: a frozen dataclass takes three times as long
    """A text to be tokenized."""

    text: str
    prompt_chars: int  # characters that belong to the prompt
    group: int
    entities: list[tuple[int, int]] | None  # half-open character spans


def make_example(row: dict[str, Any], options: IngestOptions, chat: FastTokenizer | None) -> Example:
    """Turn a row into a text; raises `BadRow`, which says what it lacks. `chat` renders messages."""
    for name in options.columns:  # a cached list: this runs once per row
        if row.get(name) is None:
            if name in row:
                raise BadRow("missing field", f"'{name}' is null")
            there = ", ".join(sorted(row)) or "none"
            raise BadRow("missing field", f"'{name}'{did_you_mean(name, row)}; fields of this row: {there}")
    if options.messages_field:
        assert chat is not None
        text, prompt_chars = _render(row[options.messages_field], chat)
    elif options.prompt_field and options.completion_field:
        prompt, completion = _text(row, options.prompt_field), _text(row, options.completion_field)
        text, prompt_chars = prompt + completion, len(prompt)
        if not completion or completion.isspace():
            raise BadRow("empty document", f"'{options.completion_field}' has no text")
    else:
        text, prompt_chars = _text(row, options.text_field), 0
    if not text or text.isspace():
        raise BadRow("empty document")
    group = -1 if options.group_field is None else _group(row[options.group_field])
    entities = None if options.entities_field is None else _entities(row[options.entities_field], len(text))
    return Example(text, prompt_chars, group, entities)


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRow("wrong type", f"'{name}' must be a string, found {type(value).__name__}")
    if value.isascii():  # a flag of the string, no look at its characters
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "invalid UTF-8", f"'{name}' has a lone surrogate at character {error.start + 1}"
        ) from None
    return value


def _render(messages: Any, chat: FastTokenizer) -> tuple[str, int]:
    """Render a conversation; the prompt is all before the last reply, or all of it where the last turn is not
    the assistant's.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRow("wrong type", "messages must be a list of objects with 'role' and 'content'")
    if broken := [i for i, m in enumerate(messages) if {"role", "content"} - set(m)]:
        raise BadRow("missing field", f"message {broken[0] + 1} lacks 'role' or 'content'")
    has_reply = messages[-1]["role"] == "assistant"
    prompt: Any = ""
    try:
        whole = chat.apply_chat_template(messages, tokenize=False)
        if has_reply and len(messages) > 1:
            prompt = chat.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise jinja2's errors, and any that their own expressions cause
        raise BadRow("chat template", str(error)) from error
    assert isinstance(whole, str)
    assert isinstance(prompt, str)
    if not has_reply:
        return whole, len(whole)
    same = (ours == theirs for ours, theirs in zip(whole, prompt, strict=False))
    return whole, next((i for i, equal in enumerate(same) if not equal), min(len(whole), len(prompt)))


def _group(value: Any) -> int:
    """Numbers name a group as they are, strings by a hash: the same person has the same group in every
    file.
    """
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=8).digest()) >> 1
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise BadRow("wrong type", f"a group is a string or a number in [0, 2^63), found {value!r:.50}")


def _entities(value: Any, length: int) -> list[tuple[int, int]]:
    """Check character spans ``[[start, end], …]``: inside the text, and none overlapping another."""
    if not isinstance(value, list):
        raise BadRow("wrong type", "entities must be a list of [start, end] pairs")
    spans = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)):
            raise BadRow("wrong type", f"an entity is a pair [start, end] of characters, found {pair!r:.50}")
        if not 0 <= pair[0] < pair[1] <= length:
            raise BadRow("entity outside the text", f"{pair} in a text of {length} characters")
        spans.append((pair[0], pair[1]))
    for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if start < end:
            raise BadRow("overlapping entities", f"one ends at {end}, the next starts at {start}")
    if len(spans) > 65_535:
        raise BadRow("too many entities", f"{len(spans)}, at most 65535 a document")
    return spans
