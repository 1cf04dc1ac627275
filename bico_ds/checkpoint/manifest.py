"""What makes a checkpoint complete: a manifest with the size and checksum of every file, and a checksum of its own.

DeepSpeed unpickles its checkpoints, so they are trusted input: nothing is loaded before its manifest has been verified.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.files import checksum, sync, sync_names, write_atomically
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.runtime.run_folder import STEP

MANIFEST = "manifest.json"
FORMAT = 1
_THREADS = min(8, os.cpu_count() or 1)

FileTable = dict[str, list[Any]]
"""`[size, checksum]` by path below the folder; the size is in bytes."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files are all there, `bytes` in all, with the content that was written.

    The content is without the table of the files: every rank gets it at a resume, and the table grows with the ranks.
    """

    path: Path
    content: dict[str, Any]
    bytes: int

    step = property(lambda self: int(self.content["step"]))
    layout = property(lambda self: self.content["layout"])


def file_table(folder: Path, files: Iterable[Path]) -> FileTable:
    """Flush files and their names to disk, and return their sizes and checksums. Raises OSError."""
    files = list(files)
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = list(threads.map(_flushed_entry, files))
    for folder_of_files in {file.parent for file in files}:
        sync_names(folder_of_files)
    return {str(file.relative_to(folder)): entry for file, entry in zip(files, entries, strict=True)}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Seal a folder; `content` holds its table as `files`."""
    sealed = {"format": FORMAT, **content}
    write_atomically(folder / MANIFEST, json.dumps({**sealed, "seal": _seal(sealed)}, indent=1) + "\n")


def verify(path: Path) -> FoundCheckpoint:
    """Compare a folder with its manifest. Raises `UserError` naming the first file that differs, or cannot be read."""
    content = _read(path / MANIFEST)
    files: FileTable = content.pop("files")
    try:
        _compare(path, files)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    return FoundCheckpoint(path, content, sum(size for size, _ in files.values()))


def content_of(path: Path) -> dict[str, Any]:
    """What a checkpoint's manifest holds, without the table of its files, none of which is looked at.

    Raises `UserError` where it is none, or was changed after it was written.
    """
    content = _read(path / MANIFEST)
    del content["files"]
    return content


def find(root: Path, report: Callable[[str], None]) -> FoundCheckpoint | None:
    """The newest complete checkpoint below `root`; damaged ones are passed over, and their damage reported.

    None where there is none at all. Raises `UserError` where there are checkpoints but no complete one.
    """
    candidates = checkpoints_in(root)
    for path in reversed(candidates):
        try:
            return verify(path)
        except UserError as error:
            report(f"damaged checkpoint passed over: {error}")
    if candidates:
        raise UserError(f"{root}: no checkpoint there is complete; start anew with --resume none")
    return None


def checkpoints_in(root: Path) -> list[Path]:
    """The folders that are named as checkpoints are, oldest first."""
    return [path for _, path in STEP.in_folder(root) if os.path.isdir(path)]


def sealed_in(root: Path) -> list[Path]:
    """Those of `checkpoints_in` that have a manifest: committed, and perhaps damaged since."""
    return [path for path in checkpoints_in(root) if os.path.isfile(path / MANIFEST)]


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return STEP.of(step)


def step_of(path: Path) -> int:
    """The step in the name of one of `checkpoints_in`."""
    step = STEP.number_in(path.name)
    assert step is not None
    return step


def _compare(path: Path, files: FileTable) -> None:
    for name, (size, _) in files.items():
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing")
        if (found := (path / name).stat().st_size) != size:
            raise UserError(f"{path / name}: {found} bytes, {size} by the manifest")
    with ThreadPoolExecutor(_THREADS) as threads:
        checksums = threads.map(lambda name: checksum(path / name, "blake2b"), files)
        for name, computed in zip(files, checksums, strict=True):
            if computed != files[name][1]:
                raise UserError(f"{path / name}: the checksum differs from the manifest's")


def _flushed_entry(file: Path) -> list[Any]:
    sync(file)
    return [file.stat().st_size, checksum(file, "blake2b")]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_object(path, strict=False)
    except JsonError as error:
        if error.is_missing:
            raise UserError(
                f"{path.parent}: no {MANIFEST}; not a checkpoint of this program, or an incomplete one"
            ) from None
        raise UserError(f"{path}: not a manifest: {error.reason}") from None
    if content.pop("seal", None) != _seal(content):
        raise UserError(f"{path}: its content was changed after it was written")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')}, this program reads format {FORMAT}")
    return content


def _seal(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
