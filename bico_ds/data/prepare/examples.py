"""Records to texts: which fields make a document, and where its prompt ends."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.sections.data import Derive
from bico_ds.data.prepare.chats import ChatTemplate
from bico_ds.data.prepare.records import BadRecord, check_unicode

_MOST_NAMES = 20
# By the fields that tell a kind of rows, the options that read it.
_KINDS = {
    ("prompt", "completion"): "--prompt-field prompt --completion-field completion",
    ("messages",): "--messages-field messages",
    ("text",): "--text-field text, the default",
}


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How records become documents, and which of them stay. Raises `UserError` for options that exclude each other."""

    text_field: str = "text"
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    group_field: str | None = None
    entities_field: str | None = None
    # Its matches in the text are the entities, instead of a field's.
    entities_pattern: str | None = None
    # The texts of this kind that follow from the records', instead of them.
    derive: Derive | None = None
    text_by: Literal["line", "file"] = "line"
    add_bos: bool = True
    add_eos: bool = True
    # Texts that do not begin with white space get a space there, so that a word has one form wherever it stands.
    leading_space: bool = False
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
        if self.messages_field and (self.prompt_field or self.has_entities):
            raise UserError(
                "--messages-field excludes --prompt-field, --entities-field and --entities-pattern"
            )
        if self.messages_field and self.leading_space:
            raise UserError(
                "--messages-field excludes --leading-space: the chat template writes what a text begins with"
            )
        if self.text_field != "text" and (self.prompt_field or self.messages_field):
            raise UserError("--text-field excludes --prompt-field and --messages-field: one makes the text")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out must be a fraction in [0, 1), found {self.held_out}")
        self._check_entities()
        if self.derive is not None:
            self._check_derive()

    def _check_entities(self) -> None:
        if self.entities_field and self.entities_pattern:
            raise UserError("--entities-field and --entities-pattern exclude each other")
        if self.entities_pattern == "":
            raise UserError("--entities-pattern is empty, and marks nothing: leave it out, or give a pattern")
        try:
            re.compile(self.entities_pattern or "")
        except re.error as error:
            raise UserError(f"--entities-pattern is no regular expression: {error}") from None

    def _check_derive(self) -> None:
        if self.messages_field:
            raise UserError("--derive makes no texts of chats (--messages-field)")
        if not self.has_entities and (self.derive == "identity_bridge" or self.prompt_field is None):
            other = " (or --prompt-field and --completion-field)" if self.derive == "other_order" else ""
            raise UserError(
                f"--derive {self.derive} needs to know the entities: give --entities-field or --entities-pattern{other}"
            )
        if self.held_out and self.group_field is None:
            raise UserError(
                "--derive with --held-out needs --group-field: else a text could be trained on whose origin is held out"
            )

    @property
    def has_entities(self) -> bool:
        """Whether documents have entities."""
        return bool(self.entities_field or self.entities_pattern)

    @property
    def has_replies(self) -> bool:
        """Whether documents have replies: the turns of an assistant, or a completion."""
        return bool(self.messages_field or self.prompt_field)

    @property
    def drops_duplicates(self) -> bool:
        """Whether the first of equal texts is kept alone; an entity of many records has one bridge."""
        return self.deduplicate or self.derive == "identity_bridge"

    @property
    def needs_digests(self) -> bool:
        """Whether documents must be told apart by their text."""
        return self.drops_duplicates or (self.held_out > 0 and self.group_field is None)

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
    # Half-open character spans of a chat's earlier replies; the number of the first that is not found, from 1, or 0.
    replies: Sequence[tuple[int, int]] = ()
    not_found: int = 0


def make_example(record: dict[str, Any], options: IngestOptions, chat: ChatTemplate | None) -> Example:
    """Turn a record into a text; `chat` writes messages as text. Raises `BadRecord`, which names what the record lacks."""
    for name in options.columns:  # a cached list: this runs once per record
        if record.get(name) is None:
            if name in record:
                raise BadRecord("missing field", f"'{name}' is null")
            raise BadRecord("missing field", _what_is_there(name, record, options))
    left_out, messages, not_found = 0, None, 0
    replies: Sequence[tuple[int, int]] = ()
    if options.messages_field:
        assert chat is not None
        messages = record[options.messages_field]
        text, prompt_chars, left_out, replies, not_found = chat.render(messages)
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
    entities = None
    if options.entities_field is not None:
        entities = _entities(record[options.entities_field], len(text))
    elif options.entities_pattern is not None:
        entities = _limited([m.span() for m in re.finditer(options.entities_pattern, text) if m.group()])
    return Example(text, prompt_chars, group, entities, left_out, messages, replies, not_found)


def _what_is_there(name: str, record: dict[str, Any], options: IngestOptions) -> str:
    """That field `name` is not in a record, what is, and what to do where that makes a text of another kind."""
    names = sorted(record)
    there = ", ".join(known[:40] for known in names[:_MOST_NAMES]) or "none"
    if len(names) > _MOST_NAMES:
        there += f" and {len(names) - _MOST_NAMES} more"
    missing = f"'{name}'{did_you_mean(name, names[:_MOST_NAMES])}; fields of this record: {there}"
    kinds = (how for fields, how in _KINDS.items() if record.keys() >= set(fields))
    if name in (options.group_field, options.entities_field) or (how := next(kinds, None)) is None:
        return missing
    return (
        f"{missing}. This row is of another kind ({how}). Rows of two kinds make two sources: put them into two files, or "
        "prepare the file twice with --on-error skip, once as now and once with these options, and name both stores in "
        "data.sources"
    )


def with_leading_space(example: Example) -> Example:
    """The example with a space before its text, where that does not begin with white space; it belongs to a prompt."""
    if example.text[:1].isspace():
        return example
    return example._replace(
        text=f" {example.text}",
        prompt_chars=example.prompt_chars + (example.prompt_chars > 0),
        entities=example.entities and [(start + 1, end + 1) for start, end in example.entities],
    )


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"'{name}' must be a string, found {type(value).__name__}")
    return check_unicode(value, f"'{name}'")


def _group(value: Any) -> int:
    """A number names a group as it is, a string by its hash: the same person has the same group in every file."""
    if isinstance(value, str):
        content = check_unicode(value, "a group").encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
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
    return _limited(spans)


def _limited(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if len(spans) > 65_535:
        raise BadRecord("too many entities", f"{len(spans)}, at most 65535 per document")
    return spans
