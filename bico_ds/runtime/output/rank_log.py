"""The log of one rank in the run folder, over all its starts. No torch here: it begins before the heavy imports."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import IO

from bico_ds.common.appended_file import MOST_KEPT, AppendedFile
from bico_ds.common.secrets import text_without_secrets
from bico_ds.runtime.provenance import versions
from bico_ds.runtime.run_folder import RANK_LOG, RunFolder

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankLog(logging.Handler):
    """Appends records to logs/rank-N.log, those of each start behind a line that says which start it is.

    Until `open` they wait: a start that is refused writes nothing into the folder of another run. What cannot be written
    then (`AppendedFile`) waits in the same way, and is lost with the process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(_FORMAT))
        self._rank = rank
        self._early: deque[bytes] = deque(maxlen=MOST_KEPT)
        self._file: AppendedFile | None = None
        self._of_faults: IO[bytes] | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self, folder: RunFolder) -> Path:
        """Begin to write into the run folder, now this start's; returns the file. Python's fatal errors go there, too."""
        file = AppendedFile(folder.logs / RANK_LOG.of(self._rank), root=folder.path)
        with self.lock or contextlib.nullcontext():
            file.add(f"{self._header()}\n".encode())
            for record in self._early:
                file.add(record)
            self._early.clear()
            self._file = file
            with contextlib.suppress(OSError):
                file.write_waiting()
                # Open to the end of the process: a fault leaves no time to open a file.
                self._of_faults = open(file.path, "ab", buffering=0)  # noqa: SIM115
                faulthandler.enable(self._of_faults)
        return file.path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = text_without_secrets(self.format(record)).encode(errors="backslashreplace") + b"\n"
        except Exception:  # as logging's own handlers do: a message that is none ends nothing
            self.handleError(record)
            return
        if self._file is None:
            self._early.append(line)
            return
        self._file.add(line)
        with contextlib.suppress(OSError):
            self._file.write_waiting()

    def _header(self) -> str:
        began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        used = ", ".join(f"{name} {version}" for name, version in versions().items())
        return (
            f"──── start {began}, rank {self._rank}, process {os.getpid()} on {socket.gethostname()}; {used}"
        )
