"""Records to texts: which fields make a document, and where its prompt ends."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.data.prepare.chats import ChatTemplate
from bico_ds.data.prepare.records import BadRecord


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How records become documents, and which of them stay. Raises `UserError` for options that exclude each other."""

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
    # The model's, where it is smaller than the tokenizer's.
    vocab_size: int | None = None
    deduplicate: bool = False
    held_out: float = 0.0
    # Of the held-out split.
    seed: int = 1

    def __post_init__(self) -> None:
        if (self.prompt_field is None) != (self.completion_field is None):
            raise UserError("--prompt-field and --completion-field go together")
        if self.messages_field and (self.prompt_field or self.entities_field):
            raise UserError("--messages-field excludes --prompt-field and --entities-field")
        if self.text_field != "text" and (self.prompt_field or self.messages_field):
            raise UserError("--text-field excludes --prompt-field and --messages-field: one makes the text")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out must be a fraction in [0, 1), found {self.held_out}")

    @property
    def needs_digests(self) -> bool:
        """Whether documents must be told apart by their text."""
        return self.deduplicate or (self.held_out > 0 and self.group_field is None)

    @cached_property
    def columns(self) -> list[str]:
        """The fields that a record must have; the first one receives the text of plain-text files."""
        if self.messages_field:
            texts = [self.messages_field]
        elif self.prompt_field and self.completion_field:
            texts = [self.prompt_field, self.completion_field]
        else:
            texts = [self.text_field]
        return [*texts, *filter(None, (self.group_field, self.entities_field))]


class Example(NamedTuple):  # made once per record: a frozen dataclass takes three times as long
    """A text to be tokenized."""

    text: str
    prompt_chars: int  # characters that belong to the prompt
    group: int
    entities: list[tuple[int, int]] | None  # half-open character spans
    # Of a chat: the first message whose content its template leaves out, from 1, and what a template could write of all.
    left_out: int = 0
    messages: Any = None


def make_example(record: dict[str, Any], options: IngestOptions, chat: ChatTemplate | None) -> Example:
    """Turn a record into a text; `chat` writes messages as text. Raises `BadRecord`, which names what the record lacks."""
    for name in options.columns:  # a cached list: this runs once per record
        if record.get(name) is None:
            if name in record:
                raise BadRecord("missing field", f"'{name}' is null")
            there = ", ".join(sorted(record)) or "none"
            detail = f"'{name}'{did_you_mean(name, record)}; fields of this record: {there}"
            raise BadRecord("missing field", detail)
    left_out, messages = 0, None
    if options.messages_field:
        assert chat is not None
        messages = record[options.messages_field]
        text, prompt_chars, left_out = chat.render(messages)
    elif options.prompt_field and options.completion_field:
        prompt, completion = _text(record, options.prompt_field), _text(record, options.completion_field)
        text, prompt_chars = prompt + completion, len(prompt)
        if not completion or completion.isspace():
            raise BadRecord("empty document", f"'{options.completion_field}' has no text")
    else:
        text, prompt_chars = _text(record, options.text_field), 0
    if not text or text.isspace():
        raise BadRecord("empty document")
    group = -1 if options.group_field is None else _group(record[options.group_field])
    entities = (
        None if options.entities_field is None else _entities(record[options.entities_field], len(text))
    )
    return Example(text, prompt_chars, group, entities, left_out, messages)


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"'{name}' must be a string, found {type(value).__name__}")
    if value.isascii():  # a flag of the string, no look at its characters
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            "invalid UTF-8", f"'{name}' has a lone surrogate at character {error.start + 1}"
        ) from None
    return value


def _group(value: Any) -> int:
    """A number names a group as it is, a string by its hash: the same person has the same group in every file."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=8).digest()) >> 1
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise BadRecord("wrong type", f"a group is a string or a number in [0, 2^63), found {value!r:.50}")


def _entities(value: Any, length: int) -> list[tuple[int, int]]:
    """Check character spans `[[start, end], …]`: inside the text, and none overlapping another."""
    if not isinstance(value, list):
        raise BadRecord("wrong type", "entities must be a list of [start, end] pairs")
    spans = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)):
            raise BadRecord(
                "wrong type", f"an entity is a pair [start, end] of characters, found {pair!r:.50}"
            )
        if not 0 <= pair[0] < pair[1] <= length:
            raise BadRecord("entity outside the text", f"{pair} in a text of {length} characters")
        spans.append((pair[0], pair[1]))
    for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if start < end:
            raise BadRecord("overlapping entities", f"one ends at {end}, the next starts at {start}")
    if len(spans) > 65_535:
        raise BadRecord("too many entities", f"{len(spans)}, at most 65535 per document")
    return spans
