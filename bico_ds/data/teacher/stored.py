"""Stored distributions of a start model over the texts of a token store: the format, and the reader.

A teacher is a folder with one part per token store, named by the store's fingerprint: `rows.bin`, which every rank
memory-maps, and `manifest.json`. Its rows are the positions of the sequences that the store's documents are cut into
(`loading/sequences.py`), one sequence after another, each without its last token, after which nothing is predicted. A row
holds the K likeliest next tokens (uint16, or uint32 where the vocabulary needs it), their log-probabilities, that of all
others together, and that of the text's own next token, all little-endian.

Log-probabilities are float16: rounding moves them by at most 2^-11 of their value, and in fp32 a row would be half as large
again. What is left of 1 after K rounded probabilities would be little but rounding, so it is stored by itself, and the
reader scales all of them so that they add up to 1.

Shape legend: N sequences, R rows, M rows that are read, K stored tokens per row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.batch import TeacherRows
from bico_ds.common.errors import UserError
from bico_ds.common.json_files import read_object
from bico_ds.data.loading.sequences import Overlong, Sequences, cut_store
from bico_ds.data.store import TokenStore, Verify
from bico_ds.data.verification import verify_rows

FORMAT_VERSION = 1
MANIFEST, ROWS = "manifest.json", "rows.bin"
_AGAIN = "prepare it again with --force"


@dataclass(frozen=True, kw_only=True)
class TeacherKey:
    """What the rows depend on.

    `store` and `model` are fingerprints (`model/weights/sampled_fingerprint.py`); `dtype` is that of the forward pass.
    """

    store: str
    capacity: int
    overlong: Overlong
    model: str
    vocabulary: int
    dtype: str
    top_k: int

    @property
    def row_dtype(self) -> np.dtype:
        """A record of `rows.bin`; `rest` and `target` are log-probabilities too."""
        ids = "<u2" if self.vocabulary <= 2**16 else "<u4"
        return np.dtype(
            [
                ("ids", ids, (self.top_k,)),
                ("log_probs", "<f2", (self.top_k,)),
                ("rest", "<f2"),
                ("target", "<f2"),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TeacherManifest:
    """What `manifest.json` states: the key, and what `rows.bin` holds. `model_name` is for messages alone."""

    format_version: int
    key: TeacherKey
    model_name: str
    rows: int
    checksum: str  # sha256

    @property
    def fingerprint(self) -> str:
        """A name of the content."""
        return _digest({**asdict(self), "model_name": None})[:32]

    def to_json(self) -> str:
        """The text of `manifest.json`, with its own checksum."""
        content = asdict(self)
        return json.dumps({**content, "manifest_checksum": _digest(content)}, indent=1) + "\n"


class StoredTeacher:
    """The distributions over one store's texts, read through a memory map."""

    def __init__(self, folder: Path, manifest: TeacherManifest, sequences: Sequences) -> None:
        self.folder, self.manifest = folder, manifest
        self.lengths = sequences.length
        self._first_row = first_rows(sequences)
        dtype = manifest.key.row_dtype
        # An empty file cannot be mapped.
        self._rows = (
            np.memmap(folder / ROWS, dtype=dtype, mode="r").view(np.ndarray)
            if manifest.rows
            else np.zeros(0, dtype=dtype)
        )

    @staticmethod
    def open(folder: Path, store: TokenStore, *, verify: Verify = "once") -> StoredTeacher:
        """Open the part of the teacher at `folder` that is over `store`.

        `verify` as in `TokenStore.open`. Raises `UserError` where there is none, and where it is damaged.
        """
        part = folder / part_name(store)
        manifest = read_manifest(part)
        if manifest is None:
            raise UserError(
                f"'{folder}' holds no distributions over the store '{store.path}' ({part.name}), {_found_in(folder)}"
            )
        key = manifest.key
        sequences = cut_store(store, longest=key.capacity, overlong=key.overlong)
        rows = int(first_rows(sequences)[-1])
        if key.store != store.fingerprint or manifest.rows != rows:
            raise UserError(
                f"'{part / MANIFEST}' is damaged: it is not of the store '{store.path}'; {_AGAIN}"
            )
        file, size = part / ROWS, rows * key.row_dtype.itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise UserError(f"'{file}' is damaged: {found or 'no'} bytes, {size} by its manifest; {_AGAIN}")
        if verify != "structure":
            verify_rows(file, manifest.checksum, again=verify == "checksums", advice=_AGAIN)
        return StoredTeacher(part, manifest, sequences)

    def read(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> TeacherRows:
        """The distributions after these positions of the sequences of these numbers, both int64 [M]."""
        rows = self._rows[self._first_row[sequences] + positions]
        log_probs = rows["log_probs"].astype(np.float64)
        total = np.exp(log_probs).sum(1) + np.exp(rows["rest"].astype(np.float64))
        scaled, target = (log_probs - np.log(total)[:, None], rows["target"] - np.log(total))
        return TeacherRows(
            ids=torch.from_numpy(rows["ids"].astype(np.int64)),
            log_probs=torch.from_numpy(scaled.astype(np.float32)),
            target_log_probs=torch.from_numpy(target.astype(np.float32)),
        )


def part_name(store: TokenStore) -> str:
    """The name of the folder in a teacher that is over this store."""
    return store.fingerprint[:16]


def first_rows(sequences: Sequences) -> NDArray[np.int64]:
    """The number of each sequence's first row, int64 [N + 1], and of all rows."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sequences.length.astype(np.int64) - 1)])


def read_manifest(part: Path) -> TeacherManifest | None:
    """The manifest in this folder; None where there is none. Raises `UserError` for a damaged one, or of another version."""
    file = part / MANIFEST
    if not file.is_file():
        return None
    try:
        content = read_object(file)
        version, own = content["format_version"], content.pop("manifest_checksum")
        if version != FORMAT_VERSION:
            raise UserError(f"'{file}' has format {version!r:.50}, not {FORMAT_VERSION}: {_AGAIN}")
        if own != _digest(content) or set(content) != {field.name for field in fields(TeacherManifest)}:
            raise UserError(f"'{file}' is damaged (its content has another checksum): {_AGAIN}")
        return TeacherManifest(**{**content, "key": TeacherKey(**content["key"])})
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"'{file}' is damaged ({error!r:.100}): {_AGAIN}") from error


def is_teacher_part(path: Path) -> bool:
    """Whether a part of a teacher lies at `path`, complete or damaged."""
    return (path / MANIFEST).is_file() and (path / ROWS).is_file()


def _found_in(folder: Path) -> str:
    """What a message says of the parts that a folder does hold."""
    if not folder.is_dir():
        return "since there is no such folder"
    parts = sorted(path.name for path in folder.iterdir() if is_teacher_part(path))
    return f"but over {', '.join(parts)}" if parts else "nor over any other"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
