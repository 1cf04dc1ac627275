"""A tokenizer's chat template, run within bounds: it is a program of whoever made the tokenizer, and need not end.

transformers runs it in jinja2's sandbox, where no internals of Python can be reached, and `range` ends at 100,000. Loops in
loops, texts that double, and powers of numbers are left: they are bounded here in processor time, memory and output.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Environment, TemplateSyntaxError

from bico_ds.common.errors import UserError

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer

# Of one chat; templates take a fraction of a millisecond for a short one.
MOST_SECONDS = 5.0
# After that the signal comes again: what it raises in a callback of the garbage collector, or a destructor, Python drops.
_SECONDS_BETWEEN = 1.0
MOST_CHARS = 1 << 24
_MOST_BYTES = 1 << 30
# The size of this process is read once in so many texts: that takes as long as a short text.
_TEXTS_BETWEEN = 64


class _OutOfTime(BaseException):
    """The template has used its time. No `Exception`, which something on the way could catch."""


class ChatRenderer:
    """Writes messages by a tokenizer's chat template, as `apply_chat_template` does, within bounds."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts = self._process_bytes = 0
        self._in_time = threading.current_thread() is threading.main_thread()
        if self._in_time:
            signal.signal(signal.SIGPROF, _stop)
        template = tokenizer.chat_template
        self._has_power = any(
            map(_raises_to_a_power, template.values() if isinstance(template, dict) else [template])
        )

    def write(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat.

        Raises `UserError` for a template that needs more than the bounds, and what the template itself raises.
        """
        if self._has_power:
            self._refuse("raises a number to a power, which may take for ever: write the number out")
        try:
            limits = self._begin()
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            finally:
                self._end(limits)
        except _OutOfTime:
            self._refuse(f"took more than {MOST_SECONDS:g} seconds of processor time for one chat")
        except MemoryError:
            self._refuse(f"took more than {_MOST_BYTES >> 30} GiB of memory for one chat")
        assert isinstance(text, str)
        if len(text) > MOST_CHARS:
            self._refuse(
                f"wrote {len(text):,} characters for one chat, and {MOST_CHARS:,} are the most: split such chats"
            )
        return text

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(
            f"the chat template of tokenizer '{self._tokenizer.name_or_path}' {problem}. Does it end? Look at "
            "chat_template.jinja, or chat_template in tokenizer_config.json, there; put a copy of the tokenizer with "
            "another template in its place"
        ) from None

    def _begin(self) -> tuple[int, int]:
        """Bound the memory, and the time in the main thread, where alone signals arrive. Returns the former limits.

        No context manager of the standard library: that takes as long again, once per text.
        """
        if self._texts % _TEXTS_BETWEEN == 0:
            self._process_bytes = _size_of_process()
        self._texts += 1
        limits = resource.getrlimit(resource.RLIMIT_AS)
        most = self._process_bytes + _MOST_BYTES
        if self._process_bytes and (limits[0] == resource.RLIM_INFINITY or most < limits[0]):
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        if self._in_time:
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS, _SECONDS_BETWEEN)
        return limits

    def _end(self, limits: tuple[int, int]) -> None:
        if self._in_time:
            signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _stop(*_: object) -> NoReturn:
    raise _OutOfTime


def _size_of_process() -> int:
    """Bytes of this process's address space; 0 where the system does not tell (it is no Linux): memory has no bound then."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _raises_to_a_power(template: str | None) -> bool:
    """Whether `**` stands in a template as an operator: no signal ends such a sum, nor jinja2's own, as it compiles.

    Before a mapping of arguments it stands after a parenthesis or a comma.
    """
    before = ""
    with contextlib.suppress(TemplateSyntaxError):  # the rendering says it better
        for _, kind, text in Environment().lex(template or ""):
            if kind == "operator" and text == "**" and before not in ("(", ","):
                return True
            before = before if kind == "whitespace" else text
    return False
