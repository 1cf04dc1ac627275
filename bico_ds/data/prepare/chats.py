"""Chats to texts, by the tokenizer's template, so that none of a message is lost or turned into Python on the way.

A message's content is a string, or a list of parts: `[{"type": "text", "text": "…"}]`. Some templates know one form
only. Given the other, they write Python's form of the list into the text, or leave the content out, and raise no error.
So each sequence of roles is tried once, with numbers in the place of contents, and every message gets the form in which
its number is found in the text: the form it has, if that does. Parts become a string as `transformers serve` makes it:
joined by spaces.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.chat_rendering import ChatRenderer
from bico_ds.data.chat_turns import Message, earlier_replies, in_common, mark_of, with_mark
from bico_ds.data.prepare.records import BadRecord, check_unicode

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer

# How a message's content is given to the template: as a string, as its parts, or as one part; "none" where it has none.
Form = Literal["string", "parts", "part", "none"]
_LISTS: tuple[Form, ...] = ("parts", "part")
# OpenAI's two interfaces name text in three ways, and transformers takes them all.
_TEXT_TYPES = ("text", "input_text", "output_text")


class ChatText(NamedTuple):
    """A chat as text."""

    text: str
    # Characters before the last reply; all, where the last message is no reply.
    prompt_chars: int
    # The number of the first message whose content the template leaves out, or, of the last reply, a part of it, from 1;
    # 0 where it leaves out none.
    left_out: int
    # Where earlier replies stand, half-open character spans; the number of the first that was not found, from 1, or 0.
    replies: list[tuple[int, int]]
    not_found: int


class ChatTemplate:
    """A tokenizer's template for chats: the default one, where it has several."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._write = ChatRenderer(tokenizer).write
        self._forms: dict[tuple[Any, ...], tuple[list[Form], int]] = {}

    def render(self, messages: Any) -> ChatText:
        """Write a chat as text. Raises `BadRecord` for messages that the template cannot write, or not completely.

        Raises `UserError` for a template that does not end within its bounds; so does `ask`.
        """
        checked = [_checked(message, number) for number, message in enumerate(_listed(messages), start=1)]
        _check_reply(checked)
        forms, left_out = self._forms_of(checked)
        given = [_in_form(message, form) for message, form in zip(checked, forms, strict=True)]
        has_reply, prompt_chars = given[-1]["role"] == "assistant", 0
        try:
            text = self._write(given)
            if has_reply and len(given) > 1:
                prompt_chars = self._prompt_chars(text, given)
            replies, not_found = earlier_replies(self._write, given, text)
        except UserError:
            raise
        except RecursionError as error:
            raise BadRecord(
                "chat template", "it calls itself without end, or the chat is nested too deeply"
            ) from error
        # Templates raise jinja2's errors, and any that their own expressions cause.
        except Exception as error:
            raise BadRecord("chat template", str(error)) from error
        _check_text(text, given)
        if not has_reply:
            return ChatText(text, len(text), left_out, replies, not_found)
        if not left_out and not _holds(text, given[-1].get("content", "")):
            left_out = len(given)
        return ChatText(text, prompt_chars, left_out, replies, not_found)

    def ask(self, question: str) -> str:
        """A chat of one question, up to where its reply begins. Raises `BadRecord` where the template cannot write it."""
        messages: list[Message] = [{"role": "user", "content": question}]
        forms, left_out = self._forms_of(messages)
        if left_out:
            raise BadRecord("chat template", "it leaves out the question")
        try:
            return self._write([_in_form(messages[0], forms[0])], add_generation_prompt=True)
        except UserError:
            raise
        except Exception as error:  # as in `render`
            raise BadRecord("chat template", str(error)) from error

    def _prompt_chars(self, text: str, given: list[Message]) -> int:
        """Characters before the last reply in the text of these messages."""
        prompt = self._write(given[:-1], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        chars = in_common(text, prompt)
        # Some templates write earlier messages in another way once a reply follows: then the reply itself is looked for.
        try:
            if chars < len(self._write(given[:-1]).rstrip()) and given[-1].get("content"):
                mark = mark_of(len(given), 0)
                before, found, _ = self._write([*given[:-1], with_mark(given[-1], mark)]).partition(mark)
                return max(chars, in_common(text, before)) if found else chars
        except UserError:
            raise
        except Exception:  # as in `_shown`: what is asked here is not what was given
            return chars
        return chars

    def _forms_of(self, messages: list[Message]) -> tuple[list[Form], int]:
        """The form for each message, and the number of the first that is left out in every form, or 0."""
        key = tuple(
            (m["role"], _form(m), _parts(m), bool(m.get("content")), "tool_calls" in m) for m in messages
        )
        if key not in self._forms:
            self._forms[key] = self._find_forms(messages)
        return self._forms[key]

    def _find_forms(self, messages: list[Message]) -> tuple[list[Form], int]:
        own = [_form(message) for message in messages]
        shown: dict[Form, set[int]] = {"string": self._shown(messages, "string", role=None)}
        if "parts" in own or any(form == "string" and i not in shown["string"] for i, form in enumerate(own)):
            # By roles: a template may know parts in the messages of some only.
            roles = dict.fromkeys(message["role"] for message in messages)
            for form in _LISTS:
                by_role = {role: self._shown(messages, form, role=role) for role in roles}
                shown[form] = {i for i, message in enumerate(messages) if i in by_role[message["role"]]}
        forms = [_best_form(form, i, shown) for i, form in enumerate(own)]
        lost = (i for i, form in enumerate(forms) if form != "none" and i not in shown[form])
        return forms, next((i + 1 for i in lost if messages[i]["content"]), 0)

    def _shown(self, messages: list[Message], form: Form, *, role: str | None) -> set[int]:
        """The messages whose content is in the text as it is: those of `role` given in this form, all others as strings."""
        marks = [[mark_of(i, part) for part in range(_parts(message))] for i, message in enumerate(messages)]
        given: list[Message] = []
        for message, own in zip(messages, marks, strict=True):
            parts = [{"type": "text", "text": mark} for mark in own]
            wanted: Form = form if message["role"] == role else "string"
            given.append(_in_form({**message, "content": parts}, wanted) if own else message)
        try:
            text = self._write(given)
        except UserError:
            raise
        except Exception:  # as in `render`, which raises it again where no other form does better
            return set()
        return {
            i
            for i, own in enumerate(marks)
            if all(mark in text and not _is_python(text, mark) for mark in own)
        }


def check_template(tokenizer: FastTokenizer, path: FolderOrHub) -> None:
    """Raise `UserError` where the tokenizer has no template for chats, or several and none of them is the default."""
    if not tokenizer.chat_template:
        raise UserError(f"tokenizer '{path}' has no chat template, which messages need")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"tokenizer '{path}' has several chat templates ({names}), and none is the default: save the one to use as "
            "chat_template.jinja in a copy of the tokenizer's folder"
        )


def template_begins_with_bos(tokenizer: FastTokenizer) -> bool:
    """Whether the template begins a chat with BOS; also where it writes no chat of a single question."""
    try:
        text = ChatRenderer(tokenizer).write([{"role": "user", "content": "a"}])
    except Exception:  # as in `ChatTemplate.render`
        return True
    return tokenizer(text, add_special_tokens=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def strings_of(messages: Any) -> Iterator[str]:
    """All strings that a template may write: contents, roles, what tools were called with."""
    left = [messages]
    while left:  # no recursion: they may be nested deeply
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += reversed(value.values())
        elif isinstance(value, list):
            left += reversed(value)


def _listed(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRecord("wrong type", "messages must be a list of objects with 'role' and 'content'")
    return messages


def _checked(message: Message, number: int) -> Message:
    """The message without what is null, as transformers takes it, and its parts without anything but their text.

    In tables each part has the columns of all kinds of parts, and a template may look for an image by the column's name.
    """
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message or ("content" not in message and not message.get("tool_calls")):
        raise BadRecord("missing field", f"message {number} lacks 'role' or 'content'")
    if not isinstance(message["role"], str):
        raise BadRecord("wrong type", f"the role of message {number} must be a string")
    if not isinstance(message.get("tool_calls", []), list):
        kind = type(message["tool_calls"]).__name__
        raise BadRecord("wrong type", f"the tool_calls of message {number} must be a list, found {kind}")
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [{"type": "text", "text": _text_of(part, number)} for part in content]
        message["content"] = parts or ""
    elif not isinstance(content, str):
        kind = type(content).__name__
        raise BadRecord("wrong type", f"the content of message {number} must be text, found {kind}")
    return message


def _text_of(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_TYPES:
        found = f"a part of type {kind!r:.50}" if isinstance(part, dict) else type(part).__name__
        raise BadRecord(
            "no text",
            f"the content of message {number} holds {found}: only parts of type 'text' can be trained on",
        )
    if not isinstance(part.get("text"), str):
        raise BadRecord("wrong type", f"a part of message {number} has no string as its 'text'")
    return part["text"]


def _check_text(text: str, messages: list[Message]) -> None:
    """What the template wrote must be writable, and hold the names of the functions that were called."""
    check_unicode(text, "the text of the messages")
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls", ()):
            if (name := _function(call)) is None or name not in text:
                raise BadRecord(
                    "chat template", f"it leaves out a tool call of message {number}: {call!r:.80}"
                )


def _function(call: Any) -> str | None:
    """The name of the function that a message calls, with OpenAI's `function` around it or without."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _check_reply(messages: list[Message]) -> None:
    """A last reply without text would teach to answer nothing."""
    last = messages[-1]
    content = last.get("content", "")
    strings = [part["text"] for part in content] if isinstance(content, list) else [content]
    if last["role"] == "assistant" and not last.get("tool_calls") and not "".join(strings).strip():
        raise BadRecord("empty document", f"the last reply, message {len(messages)}, has no text")


def _holds(text: str, content: Any) -> bool:
    """Whether all of a content is in the text: its letters and digits, in whatever form a template writes the rest."""
    strings = [part["text"] for part in content] if isinstance(content, list) else [content]
    if all(string.strip() in text for string in strings):
        return True
    written = [_letters(text), _letters(html.unescape(text))]
    forms = [(string, json.dumps(string), json.dumps(string, ensure_ascii=False)) for string in strings]
    return all(any(_letters(form) in one for form in own for one in written) for own in forms)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def _form(message: Message) -> Form:
    if "content" not in message:
        return "none"
    return "parts" if isinstance(message["content"], list) else "string"


def _parts(message: Message) -> int:
    """How many parts a message has, or becomes."""
    form = _form(message)
    return len(message["content"]) if form == "parts" else int(form == "string")


def _best_form(own: Form, index: int, shown: dict[Form, set[int]]) -> Form:
    """The form that a message has, if the template writes it so; else the next that it writes; else a string."""
    if own == "none":
        return own
    order: tuple[Form, ...] = (own, "string", *_LISTS)
    return next((form for form in order if index in shown.get(form, ())), "string")


def _in_form(message: Message, form: Form) -> Message:
    own = _form(message)
    if form in (own, "none"):
        return message
    content = message["content"]
    text = content if own == "string" else " ".join(part["text"] for part in content)
    return {**message, "content": text if form == "string" else [{"type": "text", "text": text}]}


def _is_python(text: str, mark: str) -> bool:
    """Whether the part with this text stands there as Python or JSON shows it."""
    plain = html.unescape(text).replace("\\", "")  # a template may escape it once more
    return re.search(rf"""["']text["']\s*:\s*["']{mark}""", plain, re.IGNORECASE) is not None
