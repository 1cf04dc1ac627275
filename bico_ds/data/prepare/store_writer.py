"""Writing a token store: documents are appended, the manifest comes last, and the folder gets its name when complete."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.common.files import (
    checksum,
    flush_folder,
    incomplete_folder,
    publish_folder,
    write_atomically,
)
from bico_ds.data.prepare.output_folder import refuse_output
from bico_ds.data.store import (
    COLUMNS,
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    REPLIES,
    StoreHeader,
    StoreManifest,
)


class TokenStoreWriter:
    """Writes a store into a temporary folder beside `path` and renames it when complete.

    Use as a context manager: leaving it without `finish` removes the temporary folder. A store that is already at `path`
    is replaced only with `overwrite=True`, and only when the new one is complete; anything else there never is. Raises
    `UserError` for what it may not replace. `has_replies`: whether documents come with where their replies are.
    """

    def __init__(
        self, path: Path, header: StoreHeader, *, overwrite: bool = False, has_replies: bool = False
    ) -> None:
        refuse_output(path, force=overwrite)
        self._path, self._header, self._overwrite = path, header, overwrite
        self._folder = incomplete_folder(path)
        self._token_dtype: Literal["uint16", "uint32"] = "uint16" if header.vocab_size <= 2**16 else "uint32"
        names = ["tokens", "offsets", "prompt_lengths", "groups", "word_starts"]
        names += ["entity_numbers"] if header.has_entities else []
        self._files = {name: _CheckedFile(self._folder / f"{name}.bin") for name in names}
        self._put("offsets", np.zeros(1, dtype=np.int64))
        self._documents = self._tokens = 0
        self._max_token_id = -1
        self._bitmaps = {"word_starts": _Bitmap(self._files["word_starts"])}
        if has_replies:
            # Beside the columns: the fingerprint, and what versions of before read, are those of a store without it.
            self._files[REPLIES] = _CheckedFile(self._folder / f"{REPLIES}.bin")
            self._bitmaps[REPLIES] = _Bitmap(self._files[REPLIES])

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def append(
        self,
        tokens: NDArray[np.integer],
        lengths: NDArray[np.integer],
        *,
        prompt_lengths: NDArray[np.integer],
        groups: NDArray[np.integer],
        word_starts: NDArray[np.bool_],
        entity_numbers: NDArray[np.integer] | None = None,
        replies: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append D documents of T tokens in all.

        `tokens`, `word_starts`, `entity_numbers` and `replies` are [T], the other columns [D].
        """
        assert int(lengths.sum()) == len(tokens) == len(word_starts), "columns disagree"
        assert (entity_numbers is not None) == self._header.has_entities, "entities as the header promised"
        assert (replies is not None) == (REPLIES in self._bitmaps), "replies as promised"
        if len(lengths) == 0:
            return
        self._max_token_id = max(self._max_token_id, int(tokens.max(initial=-1)))
        assert self._max_token_id < self._header.vocab_size, "token id past the vocabulary"
        self._put("tokens", tokens)
        self._put("offsets", self._tokens + np.cumsum(lengths))
        self._put("prompt_lengths", prompt_lengths)
        self._put("groups", groups)
        self._bitmaps["word_starts"].append(word_starts)
        if replies is not None:
            self._bitmaps[REPLIES].append(replies)
        if entity_numbers is not None:
            self._put("entity_numbers", entity_numbers)
        self._documents += len(lengths)
        self._tokens += len(tokens)

    def beside(self, name: str) -> Path:
        """Return the path of a further file to put into the store; it is not part of the fingerprint."""
        return self._folder / name

    def note_provenance(self, text: str | None) -> None:
        """Keep a text of `provenance` in the store; None: nothing is known."""
        if text is not None:
            self.beside(PROVENANCE).write_text(text, encoding="utf-8")

    def finish(self, *, with_checksums: Sequence[str] = ()) -> StoreManifest:
        """Flush everything to disk, write the manifest last, rename the folder. Returns the manifest.

        `with_checksums` names the files `beside` the columns that a reader must find unchanged, and folders of such files.

        Raises `UserError` where something has appeared at `path` meanwhile, without `overwrite`.
        """
        for bitmap in self._bitmaps.values():
            bitmap.finish()
        for file in self._files.values():
            file.close()
        columns = {name: file for name, file in self._files.items() if name != REPLIES}
        further = [
            *with_checksums,
            *(file.path.name for name, file in self._files.items() if name == REPLIES),
        ]
        manifest = StoreManifest(
            format_version=FORMAT_VERSION,
            documents=self._documents,
            tokens=self._tokens,
            token_dtype=self._token_dtype,
            max_token_id=self._max_token_id,
            **asdict(self._header),
            file_sizes={file.path.name: file.size for file in columns.values()},
            checksums={file.path.name: file.checksum for file in columns.values()},
            further_checksums={
                str(file.relative_to(self._folder)): checksum(file, "sha256")
                for name in further
                for file in _files_of(self._folder / name)
            },
        )
        write_atomically(self._folder / MANIFEST, manifest.to_json())
        if self._path.exists() and not self._overwrite:
            raise UserError(f"'{self._path}' appeared while it was being prepared; nothing was overwritten")
        flush_folder(self._folder)
        publish_folder(self._folder, self._path, replace=self._overwrite)
        return manifest

    def _put(self, name: str, values: NDArray[np.integer]) -> None:
        dtype = np.dtype(self._token_dtype).newbyteorder("<") if name == "tokens" else np.dtype(COLUMNS[name])
        self._files[name].write(np.ascontiguousarray(values, dtype=dtype))


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


class _Bitmap:
    """Bits to a file, eight per byte, the lowest first."""

    def __init__(self, file: _CheckedFile) -> None:
        self._file = file
        # What does not fill a byte yet.
        self._rest = np.zeros(0, dtype=bool)

    def append(self, bits: NDArray[np.bool_]) -> None:
        bits = np.concatenate([self._rest, bits])
        full = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:full], bitorder="little"))
        self._rest = bits[full:]

    def finish(self) -> None:
        self._file.write(np.packbits(self._rest, bitorder="little"))


class _CheckedFile:
    """A file that keeps the checksum and size of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)

    def write(self, values: NDArray[np.generic]) -> None:
        view = values.tobytes()
        self._file.write(view)
        self._hash.update(view)
        self.size += len(view)

    def close(self) -> None:
        self._file.close()

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()
