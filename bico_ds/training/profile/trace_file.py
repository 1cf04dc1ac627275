"""The trace of several recordings as one file that trace viewers read. No torch here."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any, TextIO

from bico_ds.common.files import temporary_sibling

_BASE = "baseTimeNanoseconds"
_LEVEL = 3  # of gzip: traces shrink to a tenth at any, and the run waits for it


class TraceFile:
    """Writes Chrome traces one after the other as one, gzipped, which is there once it is closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, temporary_sibling(path)
        self._file: TextIO | None = None
        self._base = 0

    def add(self, trace: dict[str, Any]) -> None:
        """`trace`: with all its events under `traceEvents`. Raises OSError."""
        head = {key: value for key, value in trace.items() if key != "traceEvents"}
        base = int(head.get(_BASE, 0))
        if self._file is None:
            self._base = base
            compressed = gzip.GzipFile(self._temporary, "wb", compresslevel=_LEVEL)
            self._file = io.TextIOWrapper(compressed, encoding="utf-8")
            self._file.write(json.dumps(head).removesuffix("}") + ', "traceEvents": [\n')
        else:
            self._file.write(",\n")
        later = (base - self._base) / 1e3
        events = (
            {**event, "ts": event["ts"] + later} if "ts" in event else event for event in trace["traceEvents"]
        )
        self._file.write(",\n".join(map(json.dumps, events)))

    def close(self) -> None:
        """Complete the file, if it was begun. Raises OSError, and leaves nothing then."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            with file:
                file.write("\n]}\n")
            self._temporary.replace(self._path)
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise
