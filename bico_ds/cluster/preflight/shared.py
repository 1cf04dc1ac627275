"""Is a folder the same on all nodes? The first node writes a file that all read, and every node one that the first reads.

Imports no torch.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

LATE_SECONDS = 20.0  # NFS may show a new file only after its attribute cache has run out


def write_probe(folder: Path, name: str) -> str:
    """Write a probe of this name and return its content. Raises `OSError`."""
    token = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    _probe(folder, name).write_text(token)
    return token


def sees_probe(folder: Path, name: str, token: str, *, seconds: float = LATE_SECONDS) -> bool:
    """Whether this node sees the probe with that content; waits up to `seconds` for slow file systems."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if _probe(folder, name).read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def remove_probes(folder: Path) -> None:
    """Remove the probes of all nodes."""
    for path in folder.glob(".preflight-*"):
        path.unlink(missing_ok=True)


def _probe(folder: Path, name: str) -> Path:
    return folder / f".preflight-{name}"
