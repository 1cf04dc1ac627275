"""The one frame of every command: its parser, one message instead of a traceback, and its exit code.

0 done; 1 the run failed (`RunError`); 2 wrong usage or input (`UserError`); 130 interrupted by Ctrl-C. A command may
return other codes of its own. No torch here: a command imports it before its heavy modules.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from bico_ds.common.errors import RunError, UserError
from bico_ds.common.files import DISK_ERRORS
from bico_ds.common.process_end import end_process
from bico_ds.common.secrets import text_without_secrets, words_without_secrets

INTERRUPTED = 130  # 128 + SIGINT, as a shell shows it
_SECONDS_FOR_MESSAGE = 3.0
_STDOUT = 1
_HALF = re.compile("[\ud800-\udfff]")  # how Python hands on bytes of a command line that are no text
# What moves a terminal's cursor, or sets its colours; a line or tab of ours does neither.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Parser(ArgumentParser):
    """A parser whose messages, which quote what was given, show no secrets."""

    def error(self, message: str) -> NoReturn:
        super().error(text_without_secrets(" ".join(words_without_secrets(message.split(" ")))))


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its options, and what it does with them.

    `run` gets the parsed options, and returns the exit code, or None for 0. `contradiction` returns what is wrong with
    options that are right one by one. `only_shows` tells whether these options only show something: then a reader of
    stdout that has seen enough (`… | head`) is no failure; any other work that it stops has failed. `rank` returns the
    number of this process among those of which the first alone shows an error; a command that never runs as several has
    none. `passes_on`: the words after `--` are another program's, and are in the options as `passed_on`.
    """

    description: str | None
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]
    contradiction: Callable[[Namespace], str | None] = lambda options: None
    only_shows: Callable[[Namespace], bool] = lambda options: False
    rank: Callable[[], int] | None = None
    passes_on: bool = False

    def parse(self, argv: Sequence[str] | None = None, *, prog: str | None = None) -> Namespace:
        """Parse `argv`, by default the process's own. Raises `SystemExit` with code 2 for wrong usage."""
        parser = _Parser(prog=prog, description=self.description, formatter_class=RawDescriptionHelpFormatter)
        self.add_options(parser)
        words = list(sys.argv[1:] if argv is None else argv)
        if unreadable := next((word for word in words if _HALF.search(word)), None):
            parser.error(
                f"{unreadable!a} is no text in {sys.getfilesystemencoding()}, as this terminal's words should be; with a "
                "UTF-8 locale, or PYTHONUTF8=1, all names can be given"
            )
        if self.passes_on:
            end = words.index("--") if "--" in words else len(words)
            options = parser.parse_args(words[:end], Namespace(passed_on=words[end + 1 :]))
        else:
            options = parser.parse_args(words)
        if problem := self.contradiction(options):
            parser.error(problem)
        return options

    def __call__(self, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
        """Parse, run, and return the exit code. Raises `SystemExit` for wrong usage and for `--help`."""
        options = self.parse(argv, prog=prog)
        try:
            return self.run(options) or 0
        except (UserError, RunError) as error:
            self._report(error)
            return error.exit_code
        except (BrokenPipeError, SystemExit) as ended:
            if not lost_its_reader(ended):
                raise
            if self.only_shows(options):
                return 0
            unread = RunError("stopped midway: its output is not read any more")
            self._report(unread)
            return unread.exit_code

    def start(self, argv: Sequence[str] | None = None, *, prog: str | None = None) -> NoReturn:
        """Run the command, and end this process with its exit code."""
        end_process(exit_code(lambda: self(argv, prog=prog)))

    def _report(self, error: UserError | RunError) -> None:
        """One message. Other ranks wait for it: a launcher ends all ranks when the first one ends."""
        if self._is_first():
            # Without a reader of stderr the exit code is all that is left, and it must stay that of the error.
            with contextlib.suppress(BrokenPipeError):
                shown = text_without_secrets(str(error))
                message = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", shown)
                print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SECONDS_FOR_MESSAGE)

    def _is_first(self) -> bool:
        """Whether this process shows errors; one that cannot tell its number shows its own."""
        try:
            return self.rank is None or self.rank() == 0
        except UserError:
            return True


def exit_code(work: Callable[[], int]) -> int:
    """Do the work of a process, and return its exit code, whatever ends it: `end_process` is to be its end in every case.

    A reader that has seen enough of a help text is no failure: 0. A disk that is full is told in one line, other exceptions
    as Python shows them: 1. Whatever the locale, all that is printed can be: what its encoding lacks as `\\u2026`.
    """
    _print_everything()
    try:
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as ended:
        if lost_its_reader(ended):
            return 0
        if isinstance(ended, SystemExit) and not isinstance(ended.code, str):
            return ended.code or 0
        return _failed(ended)
    except BaseException as error:
        return _failed(error)


def _print_everything() -> None:
    """Let no character, and no closed descriptor (`>&-`), end a command that prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # to the end of the process
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):  # a test's, or a notebook's, is none
            with contextlib.suppress(
                OSError
            ):  # it writes what waits; whoever prints next learns that nobody reads it
                stream.reconfigure(errors="backslashreplace")


def _failed(error: BaseException) -> int:
    with contextlib.suppress(BrokenPipeError):
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
            print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
            if error.filename is None:  # what is left to be written would fail again, and be told again
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    return 1


def lost_its_reader(ended: BrokenPipeError | SystemExit) -> bool:
    """Whether this ended the work because nobody reads stdout any more, and not for a broken socket, say, of a rank.

    rich makes `SystemExit` of a `BrokenPipeError`, with stdout on /dev/null from then on.
    """
    if isinstance(ended, SystemExit):
        return isinstance(ended.__context__, BrokenPipeError)
    stdout = select.poll()
    stdout.register(_STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in stdout.poll(0))
