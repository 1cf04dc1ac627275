"""What a rank says, and where: the console gets what the user can act on, the rank's log everything. No torch here.

Three ways lead out of a process. What is logged (also Python's warnings, and exceptions that nothing catches) goes to the
log, and to the console from the level of `_least`. What libraries print from Python goes to the log in `libraries_apart`
blocks. What they write to descriptor 1 themselves goes straight into the log's file once that is open, and so is kept
whatever ends the process; Python's own stdout is moved to a copy of the descriptor. Descriptor 2 stays the console's: the
last words of a process that dies are written there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime.output.rank_log import RankLog
from bico_ds.runtime.run_folder import RunFolder

Verbosity = Literal["quiet", "normal", "verbose"]

# `extra` of what the console has got another way. Such records are INFO: without a context nobody shows them again.
TOLD = {"told": True}
_PRINTED = "printed"  # the logger of what libraries print
# Of these the console gets errors alone: their warnings are to whoever writes a program.
_LIBRARIES = frozenset(
    {"DeepSpeed", "accelerate", "datasets", "huggingface_hub", "peft", "py.warnings", "torch", "transformers"}
    | {_PRINTED}
)
_OURS = "bico_ds"
_STDOUT = 1

_logger = logging.getLogger(__name__)


class ProcessOutput:
    """A context: from its beginning to its end the process's output goes where the module says."""

    def __init__(self, verbosity: Verbosity = "normal", *, rank: int = 0) -> None:
        self.verbosity: Verbosity = verbosity
        self._rank = rank
        self._log = RankLog(rank)
        self._console = _Console()
        self._console.addFilter(self._is_shown)
        self._moved: int | None = None  # a copy of descriptor 1, which Python's stdout writes to

    @property
    def is_quiet(self) -> bool:
        return self.verbosity == "quiet"

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(self._log)
        root.addHandler(self._console)
        logging.captureWarnings(True)
        self._hook, threading.excepthook = threading.excepthook, self._log_thread
        if self.verbosity != "verbose" and _is_descriptor(sys.stdout, _STDOUT):
            self._moved = os.dup(_STDOUT)
            with tempfile.TemporaryFile() as until_opened:
                os.dup2(until_opened.fileno(), _STDOUT)
            # To the end of the process, which prints behind this context, too.
            sys.stdout = open(
                self._moved, "w", buffering=1, encoding=sys.stdout.encoding, errors="backslashreplace"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError | RunError):
            _logger.error("%s", error, extra=TOLD)
        elif error is not None:
            _logger.error("%s", error, exc_info=error, extra=TOLD)
        if self._moved is not None:
            ctypes.CDLL(None).fflush(None)  # what C's stdout holds back belongs into the log, too
            os.dup2(self._moved, _STDOUT)
        threading.excepthook = self._hook
        logging.captureWarnings(False)
        root = logging.getLogger()
        root.removeHandler(self._console)
        root.removeHandler(self._log)

    def open_log(self, folder: RunFolder) -> None:
        """Write the rank's log into this run folder from now on, if that is not so yet: nothing there is another start's."""
        if self._log.is_open:
            return
        path = self._log.open(folder)
        if self._moved is not None:
            with contextlib.suppress(OSError), open(path, "ab") as log:
                log.write(_content(_STDOUT))
                log.flush()
                os.dup2(log.fileno(), _STDOUT)

    def adopt_libraries(self) -> None:
        """Let what the imported libraries log come here: those that show it themselves do so no more."""
        for name in _LIBRARIES - {"torch"}:  # torch's is what the user asks for by TORCH_LOGS
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.INFO)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "told", False) and record.levelno >= self._least(record.name)

    def _least(self, name: str) -> int:
        """The lowest level that the console shows of a logger."""
        top = name.partition(".")[0]
        if top == _OURS:
            return logging.WARNING if self._rank != 0 or self.is_quiet else logging.INFO
        if self.verbosity == "verbose":
            return logging.INFO
        return logging.ERROR if name in _LIBRARIES or top in _LIBRARIES else logging.WARNING

    def _log_thread(self, failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            where = failed.thread.name if failed.thread is not None else "a thread"
            _logger.error("%s has failed", where, exc_info=failed.exc_value, extra=TOLD)
        self._hook(failed)


@contextlib.contextmanager
def libraries_apart() -> Iterator[None]:
    """What is printed in this block is logged as the libraries': nothing of ours is, which is logged anyway."""
    with contextlib.redirect_stdout(_Printed()):
        yield


class _Console(logging.Handler):
    """Writes to whatever stderr is at that moment: while a live line is shown, that is what prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(_with_whole_words(self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _with_whole_words(text: str) -> str:
    """With line breaks between words where stderr is a terminal, which breaks lines anywhere."""
    if not sys.stderr.isatty():
        return text
    width = os.get_terminal_size(sys.stderr.fileno()).columns or len(text)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    lines = (line if len(line) <= width else wrapper.fill(line) for line in text.split("\n"))
    return "\n".join(lines)


class _Printed:
    """A stdout whose lines are logged."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger(_PRINTED).info("%s", line)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def _content(number: int) -> bytes:
    """What the file of a descriptor that is open for reading, too, has in it; of any size that chatter has."""
    return os.pread(number, os.fstat(number).st_size, 0)


def _is_descriptor(stream: Any, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (AttributeError, OSError, ValueError):
        return False
