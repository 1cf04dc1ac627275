"""The token store: documents as tokens in flat files, memory-mapped by every rank.

A store is a folder: ``tokens.bin`` (uint16 or uint32), ``offsets.bin`` (int64, one more than documents),
the per-document columns ``prompt_lengths.bin`` (int32) and ``groups.bin`` (int64), the bitmap
``word_starts.bin`` (a bit per token, little-endian within a byte), optionally ``entity_numbers.bin`` (uint16
per token), and ``manifest.json``, written last. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.common.files import checksum, incomplete_folder, publish_folder, write_atomically

if TYPE_CHECKING:
    from bico_ds.documents import Documents

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_AGAIN = "prepare it again with --force"
_COLUMNS = {
    "offsets": "<i8",
    "prompt_lengths": "<i4",
    "groups": "<i8",
    "word_starts": "u1",
    "entity_numbers": "<u2",
}


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store says of itself."""

    format_version: int
    documents: int
    tokens: int
    token_dtype: Literal["uint16", "uint32"]
    max_token_id: int
    vocab_size: int  # one more than the largest id that is allowed: the tokenizer's, or --vocab-size
    tokenizer_hash: str
    special_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    add_bos: bool  # every document starts with bos_id; a packer that splits repeats it for each piece
    add_eos: bool  # every document ends with eos_id
    has_entities: bool
    file_sizes: dict[str, int]  # bytes
    checksums: dict[str, str]  # sha256

    @property
    def fingerprint(self) -> str:
        """Names the content: equal for equal bytes and header, wherever and whenever they were written."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What a writer must know before the first document: tokenizer and policy."""

    vocab_size: int
    tokenizer_hash: str
    special_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    add_bos: bool
    add_eos: bool
    has_entities: bool = False


class TokenStore:
    """A finished store, read through memory maps. A copy sent to another process maps the files anew."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path, self.manifest = path, manifest
        self._open_maps()

    @staticmethod
    def open(
        path: str | Path,
        *,
        verify: Literal["sizes", "checksums"] = "sizes",
        tokenizer_hash: str | None = None,
    ) -> TokenStore:
        """Open the store at `path`; `UserError` if it is missing, incomplete, damaged, of another format version, or made
        with another tokenizer than that of `tokenizer_hash`.

        Sizes are always compared with the manifest; ``verify="checksums"`` reads every byte.
        """
        place = Path(path)
        manifest = _read_manifest(place)
        for name, size in manifest.file_sizes.items():
            _check_size(place / name, size)
        if verify == "checksums":
            for name, expected in manifest.checksums.items():
                if checksum(place / name, "sha256") != expected:
                    raise UserError(f"token store '{place}' is damaged: wrong checksum of {name}; {_AGAIN}")
        if tokenizer_hash is not None and tokenizer_hash != manifest.tokenizer_hash:
            raise UserError(
                f"token store '{place}' was made with another tokenizer ({manifest.tokenizer_hash}) than "
                f"this run's ({tokenizer_hash}): prepare it again with the model's tokenizer"
            )
        return TokenStore(place, manifest)

    @property
    def fingerprint(self) -> str:
        """Names the content of the store."""
        return self.manifest.fingerprint

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [n]; computed from the memory-mapped offsets."""
        return np.diff(self._offsets)

    @property
    def groups(self) -> NDArray[np.int64]:
        """The group of each document, int64 [n], memory-mapped; -1 where unknown."""
        return self._groups

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document's prompt, int32 [n], memory-mapped; 0 where it has none."""
        return self._prompt_lengths

    @property
    def completions(self) -> int:
        """How many documents have a prompt and something behind it."""
        return int(((self.prompt_lengths > 0) & (self.prompt_lengths < self.lengths)).sum())

    @property
    def has_entities(self) -> bool:
        """Whether documents come with the spans of their entities."""
        return self.manifest.has_entities

    def __len__(self) -> int:
        return self.manifest.documents

    def read(
        self,
        ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        pieces: NDArray[np.int64],
        *,
        source: int,
    ) -> Documents:
        """Gather slices of documents, in the order given; all arguments int64 [D].

        Slice d is ``[starts[d], starts[d] + lengths[d])`` of document ``ids[d]``, and becomes its piece
        ``pieces[d]``. Entity numbers stay those of the whole document; prompt lengths are cut to the slice.
        """
        from bico_ds.documents import Documents

        ids, starts, lengths = (np.asarray(a, dtype=np.int64) for a in (ids, starts, lengths))
        begins = self._offsets[ids] + starts
        assert np.all((starts >= 0) & (begins + lengths <= self._offsets[ids + 1])), (
            "a slice leaves its document"
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = self._places(begins, offsets)
        return Documents(
            token_ids=self._tokens[at].astype(np.int64),
            offsets=offsets,
            source=np.full(len(ids), source, dtype=np.int64),
            id=ids,
            piece=np.asarray(pieces, dtype=np.int64),
            prompt_length=np.clip(self._prompt_lengths[ids].astype(np.int64) - starts, 0, lengths),
            group=np.asarray(self._groups[ids], dtype=np.int64),
            word_starts=self._read_word_starts(at),
            entity_number=None if self._entities is None else self._entities[at].astype(np.int64),
        )

    def _places(self, begins: NDArray[np.int64], offsets: NDArray[np.int64]) -> slice | NDArray[np.int64]:
        """Where the tokens of slices lie in the store; slices that follow one another are one."""
        lengths = np.diff(offsets)
        if len(begins) and np.array_equal(begins[1:], begins[:-1] + lengths[:-1]):
            return slice(int(begins[0]), int(begins[0] + offsets[-1]))
        return np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)

    def _read_word_starts(self, at: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Bits, eight a byte, the lowest first."""
        if isinstance(at, slice):
            first = at.start & ~7
            bits = np.unpackbits(self._word_starts[first >> 3 : (at.stop + 7) >> 3], bitorder="little")
            return bits[at.start - first : at.stop - first].view(bool)
        return (self._word_starts[at >> 3] >> (at & 7).astype(np.uint8) & 1).view(bool)

    def whole(self, ids: NDArray[np.int64], *, source: int = 0) -> Documents:
        """Read whole documents."""
        ids = np.asarray(ids, dtype=np.int64)
        zeros = np.zeros_like(ids)
        return self.read(ids, zeros, self._offsets[ids + 1] - self._offsets[ids], zeros, source=source)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open_maps()

    def _open_maps(self) -> None:
        dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._tokens = _map(self.path / "tokens.bin", dtype)
        self._offsets = _map(self.path / "offsets.bin", _COLUMNS["offsets"])
        self._prompt_lengths = _map(self.path / "prompt_lengths.bin", _COLUMNS["prompt_lengths"])
        self._groups = _map(self.path / "groups.bin", _COLUMNS["groups"])
        self._word_starts = _map(self.path / "word_starts.bin", _COLUMNS["word_starts"])
        self._entities = None
        if self.manifest.has_entities:
            self._entities = _map(self.path / "entity_numbers.bin", _COLUMNS["entity_numbers"])


class TokenStoreWriter:
    """Writes a store into a temporary folder beside `path` and renames it when complete.

    Use as a context manager: leaving it without `finish` removes the temporary folder. A store already at
    `path` is replaced only with ``overwrite=True``, and only at the moment the new one is complete; what is
    no store is never replaced. Raises `UserError` for what it does not replace.
    """

    def __init__(self, path: Path, header: StoreHeader, *, overwrite: bool = False) -> None:
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
        self._bit_rest = np.zeros(0, dtype=bool)  # word starts that do not fill a byte yet

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
    ) -> None:
        """Append documents: `tokens`, `word_starts` and `entity_numbers` are [T] of all of them, the rest
        [D].
        """
        assert int(lengths.sum()) == len(tokens) == len(word_starts), "columns disagree"
        assert (entity_numbers is not None) == self._header.has_entities, "entities as the header promised"
        if len(lengths) == 0:
            return
        self._max_token_id = max(self._max_token_id, int(tokens.max(initial=-1)))
        assert self._max_token_id < self._header.vocab_size, "token id past the vocabulary"
        self._put("tokens", tokens)
        self._put("offsets", self._tokens + np.cumsum(lengths))
        self._put("prompt_lengths", prompt_lengths)
        self._put("groups", groups)
        self._put_bits(word_starts)
        if entity_numbers is not None:
            self._put("entity_numbers", entity_numbers)
        self._documents += len(lengths)
        self._tokens += len(tokens)

    def beside(self, name: str) -> Path:
        """Return the path of a further file that moves along into the store; not part of its fingerprint."""
        return self._folder / name

    def finish(self) -> StoreManifest:
        """Flush everything to disk, write the manifest last, rename. Returns the manifest.

        Raises `UserError` where something has appeared at `path` meanwhile, without ``overwrite``.
        """
        self._files["word_starts"].write(np.packbits(self._bit_rest, bitorder="little"))
        for file in self._files.values():
            file.close()
        manifest = StoreManifest(
            format_version=FORMAT_VERSION,
            documents=self._documents,
            tokens=self._tokens,
            token_dtype=self._token_dtype,
            max_token_id=self._max_token_id,
            **asdict(self._header),
            file_sizes={file.path.name: file.size for file in self._files.values()},
            checksums={file.path.name: file.checksum for file in self._files.values()},
        )
        write_atomically(self._folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        if self._path.exists() and not self._overwrite:
            raise UserError(f"'{self._path}' appeared while it was being prepared; nothing was overwritten")
        publish_folder(self._folder, self._path, replace=self._overwrite)
        return manifest

    def _put(self, name: str, values: NDArray[np.integer]) -> None:
        dtype = (
            np.dtype(self._token_dtype).newbyteorder("<") if name == "tokens" else np.dtype(_COLUMNS[name])
        )
        self._files[name].write(np.ascontiguousarray(values, dtype=dtype))

    def _put_bits(self, bits: NDArray[np.bool_]) -> None:
        bits = np.concatenate([self._bit_rest, bits])
        whole = len(bits) // 8 * 8
        self._files["word_starts"].write(np.packbits(bits[:whole], bitorder="little"))
        self._bit_rest = bits[whole:]


class _CheckedFile:
    """A file that knows the checksum and size of what was written to it."""

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


def is_store(path: Path) -> bool:
    """Return whether a token store lies there, whole or damaged."""
    return (path / MANIFEST).is_file() and any((path / f).is_file() for f in ("tokens.bin", "offsets.bin"))


def refuse_output(path: Path, *, force: bool, is_ours: Callable[[Path], bool] = is_store) -> None:
    """Raise `UserError` for an output that exists; with `force` only where it is neither ours nor empty."""
    if not path.exists():
        return
    if not force:
        raise UserError(f"'{path}' exists: choose another folder, or give --force to replace it")
    if not is_ours(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"'{path}' was not written by this command, and --force replaces nothing else: choose another "
            "folder, or remove it yourself"
        )


def _read_manifest(place: Path) -> StoreManifest:
    file = place / MANIFEST
    if not place.is_dir():
        raise UserError(f"no token store at '{place}': make one with tools/prepare_data.py")
    if not file.is_file():
        raise UserError(f"'{place}' is not a complete token store: it has no {MANIFEST}; prepare it again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is damaged ({error}): {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"token store '{place}' has format {version}, not {FORMAT_VERSION}: {_AGAIN}")
    if missing := {field.name for field in fields(StoreManifest)} ^ set(content):
        raise UserError(f"'{file}' is damaged (fields {sorted(missing)}): {_AGAIN}")
    return StoreManifest(**{**content, "special_ids": tuple(content["special_ids"])})


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise UserError(f"token store '{file.parent}' is incomplete: {file.name} is missing; {_AGAIN}")
    if (found := file.stat().st_size) != size:
        raise UserError(
            f"token store '{file.parent}' is damaged: {file.name} has {found} bytes, its manifest "
            f"says {size}; {_AGAIN}"
        )


def _map(path: Path, dtype: str | np.dtype) -> NDArray:
    """Memory-map a column, as a plain array (slices of np.memmap are slow); an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
