"""Whether a token store, or a teacher, holds the bytes that were written: its checksums, compared once per machine.

This machine keeps a record of the stores that it has verified, in `$XDG_CACHE_HOME/bico_ds` (`~/.cache/bico_ds`). It names
each by what changes when anybody writes to it or puts another file in its place: path, device, inode, size and both times of
change of every file. Another machine that shares the home folder has a record of its own: it reads through its own memory
and network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.progress import Progress
from bico_ds.data.store_checks import AGAIN
from bico_ds.runtime import launch_environment

if TYPE_CHECKING:
    from bico_ds.data.store import StoreManifest

# Stores up to this size are read at every start, in a twentieth of a second: a record of them would save nothing.
_SMALL_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 24
_TOKENS = "tokens.bin"


def verify_files(folder: Path, manifest: StoreManifest, *, again: bool) -> None:
    """Compare all files of a store with the manifest's checksums, and its ids with the vocabulary.

    Without `again`, a store that this machine has verified since it was last written is not read. Rank 0 shows how far it
    is. Raises `UserError` where they differ, or a file is missing, and OSError where one cannot be read.
    """
    further = manifest.further_checksums.items()
    # A store may have lost the folder of its tokenizer as a whole: then nobody reads it.
    kept = {name: checksum for name, checksum in further if (folder / name).parent.is_dir()}
    checksums = {**manifest.checksums, **kept}
    if missing := [name for name in checksums if not (folder / name).is_file()]:
        raise UserError(f"token store '{folder}' is incomplete: {missing[0]} is missing; {AGAIN}")
    _verify_once(folder, checksums, lambda count: _compare(folder, manifest, checksums, count), again=again)


def verify_rows(file: Path, checksum: str, *, again: bool, advice: str) -> None:
    """Compare the rows of a stored teacher with their SHA-256, as `verify_files` does the files of a store.

    Raises `UserError`, which ends with `advice`, where they differ.
    """

    def compare(count: Callable[[int], None]) -> None:
        found, _ = _read(file, np.dtype(np.uint8), count)
        if found != checksum:
            raise UserError(f"'{file}' is damaged: it has another checksum; {advice}")

    _verify_once(file.parent, {file.name: checksum}, compare, again=again)


def _verify_once(
    folder: Path,
    checksums: dict[str, str],
    compare: Callable[[Callable[[int], None]], None],
    *,
    again: bool,
) -> None:
    """Let `compare` read these files, unless this machine has a record of it; it tells what it is given the bytes read."""
    identity = _identity(folder, checksums)
    size = sum((folder / name).stat().st_size for name in checksums)
    record = _record_file(folder) if size > _SMALL_BYTES else None
    if record is not None and not again and _recorded(record) == identity:
        return
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(console, *columns, enabled=launch_environment.rank() == 0, transient=True) as shown:
        read = 0

        def count(more: int) -> None:
            nonlocal read
            read += more
            text = f"{read / 1e9:.1f} of {size / 1e9:.1f} GB"
            shown.update(read, f"verifying the checksums of {folder}: {text}", text=text)

        shown.begin(f"verifying {folder.name}", total=size)
        compare(count)
    if record is not None:
        # A home folder that cannot be written costs the next start another reading, and nothing else.
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                record, json.dumps({"store": str(folder.resolve()), "identity": identity}) + "\n"
            )


def _compare(
    folder: Path, manifest: StoreManifest, checksums: dict[str, str], count: Callable[[int], None]
) -> None:
    largest = -1
    for name, expected in checksums.items():
        dtype = np.dtype(manifest.token_dtype).newbyteorder("<") if name == _TOKENS else np.dtype(np.uint8)
        found, most = _read(folder / name, dtype, count)
        if found != expected:
            raise UserError(f"token store '{folder}' is damaged: wrong checksum of {name}; {AGAIN}")
        largest = most if name == _TOKENS else largest
    if largest != manifest.max_token_id:
        raise UserError(
            f"token store '{folder}' is damaged: its largest id is {largest}, {manifest.max_token_id} by its "
            f"manifest; {AGAIN}"
        )


def _read(file: Path, dtype: np.dtype, count: Callable[[int], None]) -> tuple[str, int]:
    """SHA-256 and the largest item of a file, −1 where it is empty; `count` is told the bytes of each block."""
    digest, largest = hashlib.sha256(), -1
    with open(file, "rb") as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
            items = np.frombuffer(block, dtype=dtype, count=len(block) // dtype.itemsize)
            largest = max(largest, int(items.max(initial=0)))
            count(len(block))
    return digest.hexdigest(), largest


def _identity(folder: Path, checksums: dict[str, str]) -> str:
    """A name for these files as they are now; the time of status change shows a write that restored the other one."""
    parts = []
    for name, checksum in checksums.items():
        status = os.stat(folder / name)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        parts.append([name, checksum, status.st_dev, status.st_ino, status.st_size, *times])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record_file(folder: Path) -> Path | None:
    """Where this machine keeps its record of a store; None for a user without a home folder, as in some containers."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bico_ds"
    except RuntimeError:
        return None
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache / "verified_stores" / socket.gethostname() / f"{name}.json"


def _recorded(record: Path) -> str | None:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
