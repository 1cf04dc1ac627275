"""Where the turns of an assistant stand in the text that a template wrote of a chat.

Templates tell nobody. A reply is found by what the template writes of the messages up to it, where that is how the whole
text begins; and, where a later message changes what is written before (as a system prompt that Mistral's templates put into
the last question), by a number in the place of its content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bico_ds.common.errors import UserError

Message = dict[str, Any]
Write = Callable[..., str]
"""`ChatRenderer.write`."""


def earlier_replies(write: Write, messages: list[Message], text: str) -> tuple[list[tuple[int, int]], int]:
    """The replies before the last message in `text`, which `write` made of all messages: half-open character spans.

    A reply begins where the prompt for it ends, and ends with the token that ends its turn, before white space. Returns also
    the number, from 1, of the first one that is not found; 0 where all are. Raises `UserError` as `ChatRenderer.write` does.
    """
    spans: list[tuple[int, int]] = []
    lost = 0
    for index, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        span = _attempt(_by_beginning, write, messages, index, text)
        span = span or _attempt(_by_mark, write, messages, index, text)
        if span is not None and span[0] >= (spans[-1][1] if spans else 0):
            spans.append(span)
        else:
            lost = lost or index + 1
    return spans, lost


def in_common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(one), len(other)))


def mark_of(message: int, part: int) -> str:
    """A content that no template contains, and none changes: a number."""
    return f"70351{message:06d}{part:06d}94682"


def with_mark(message: Message, mark: str) -> Message:
    """The message with `mark` as its content, in the form that its own has."""
    is_list = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": mark}] if is_list else mark}


def _attempt(
    find: Callable[..., tuple[int, int] | None], write: Write, messages: list[Message], index: int, text: str
) -> tuple[int, int] | None:
    try:
        return find(write, messages, index, text)
    except UserError:
        raise
    # A template may refuse a part of a chat, by an error of its own or of jinja2.
    except Exception:
        return None


def _by_beginning(write: Write, messages: list[Message], index: int, text: str) -> tuple[int, int] | None:
    prompt = write(messages[:index], add_generation_prompt=True)
    whole = write(messages[: index + 1]).rstrip()
    if len(prompt) < len(whole) and text.startswith(whole) and text.startswith(prompt):
        return len(prompt), len(whole)
    return None


def _by_mark(write: Write, messages: list[Message], index: int, text: str) -> tuple[int, int] | None:
    """Where its content stands, with what follows both in the chat and where the chat ends with it: the end of its turn."""
    if not messages[index].get("content"):
        return None
    mark = mark_of(len(messages), 0)
    marked = with_mark(messages[index], mark)
    before, found, after = write([*messages[:index], marked, *messages[index + 1 :]]).partition(mark)
    begin, end = len(before), len(text) - len(after)
    if not found or begin >= end or not text.startswith(before) or not text.endswith(after):
        return None
    short_before, found, short_after = write([*messages[:index], marked]).partition(mark)
    if not found:
        return begin, end
    end += len(after[: in_common(after, short_after)].rstrip())
    prompt = write(messages[:index], add_generation_prompt=True)
    lead = short_before[len(prompt) :] if short_before.startswith(prompt) else ""
    return (begin - len(lead) if before.endswith(lead) else begin), end
