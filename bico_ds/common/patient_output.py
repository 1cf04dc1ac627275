"""Output of a process that has more important work than to be read. No torch here."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from bico_ds.common.files import DISK_ERRORS


class PatientStream:
    """A text stream into a file: while its disk is full, what is written is left out, and then how much that was is said.

    A reader that is gone (`BrokenPipeError`) is another matter, and is raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lost = stream, 0

    def write(self, text: str) -> int:
        try:
            if self._lost:
                self._stream.write(f"\nWARNING: {self._lost:,} characters of output could not be written\n")
                self._lost = 0
            self._stream.write(text)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            self._lost += len(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_full_disks() -> None:
    """From now on a full disk under stdout or stderr (a log in the run folder, say) is no error of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PatientStream):
            setattr(sys, name, PatientStream(stream))
