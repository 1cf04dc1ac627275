"""The token store: its format, and the reader. Documents are tokens in flat files that every rank memory-maps.

A store is a folder: `tokens.bin` (uint16 or uint32), `offsets.bin` (int64, one more than documents), the per-document
columns `prompt_lengths.bin` (int32) and `groups.bin` (int64), the bitmap `word_starts.bin` (one bit per token,
little-endian within a byte), optionally `entity_numbers.bin` (uint16 per token), and `manifest.json`. Stores of chats,
and of prompts with completions, have a bitmap `reply_tokens.bin` beside the columns; those of earlier versions have
none. All numbers are little-endian. `prepare/store_writer.py` writes stores.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.data.store_checks import AGAIN, check_columns, check_manifest, check_size
from bico_ds.data.tokenizer import Tokenizer, special_ids, tokenizer_hash
from bico_ds.data.verification import verify_files

if TYPE_CHECKING:
    from bico_ds.documents import Documents

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# A text beside the columns: where the store's texts are from, and their licence. Not every store has one.
PROVENANCE = "provenance.txt"
# A bitmap beside the columns: the tokens of replies. It is no part of the fingerprint; `replies_checksum` names it.
REPLIES = "reply_tokens"
_MANIFEST_CHECKSUM = "manifest_checksum"
Verify = Literal["once", "checksums", "structure"]
COLUMNS = {
    "offsets": "<i8",
    "prompt_lengths": "<i4",
    "groups": "<i8",
    "word_starts": "u1",
    "entity_numbers": "<u2",
}


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What `manifest.json` states: counts, the tokenizer, how documents were made, and the files."""

    format_version: int
    documents: int
    tokens: int
    token_dtype: Literal["uint16", "uint32"]
    max_token_id: int
    # One more than the largest id that is allowed: the tokenizer's, or --vocab-size.
    vocab_size: int
    tokenizer_hash: str
    special_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    # Every document starts with `bos_id`; where a document is split, each piece does.
    add_bos: bool
    # Every document ends with `eos_id`.
    add_eos: bool
    has_entities: bool
    file_sizes: dict[str, int]  # bytes
    checksums: dict[str, str]  # sha256
    # sha256 of files beside the columns, by path in the store; stores of version 0.1.0 have none.
    further_checksums: dict[str, str] = field(default_factory=dict)
    # Every text was tokenized with a space before it.
    leading_space: bool = False

    @property
    def fingerprint(self) -> str:
        """A name of the content: equal for equal bytes and header, wherever and whenever they were written."""
        content = self._content()
        del content["further_checksums"]
        return _digest(content)[:32]

    @property
    def replies_checksum(self) -> str | None:
        """A name of where the replies are; None for a store that does not have it."""
        return self.further_checksums.get(f"{REPLIES}.bin")

    @property
    def expected_sizes(self) -> dict[str, int]:
        """By file, its size in bytes as the counts give it."""
        items = {"offsets": self.documents + 1, "prompt_lengths": self.documents, "groups": self.documents}
        items["word_starts"] = -(-self.tokens // 8)
        if self.has_entities:
            items["entity_numbers"] = self.tokens
        sizes = {f"{name}.bin": count * np.dtype(COLUMNS[name]).itemsize for name, count in items.items()}
        return {"tokens.bin": self.tokens * np.dtype(self.token_dtype).itemsize, **sizes}

    def to_json(self) -> str:
        """The text of `manifest.json`, which ends with the checksum of all that comes before."""
        content = self._content()
        return json.dumps({**content, _MANIFEST_CHECKSUM: _digest(content)}, indent=1) + "\n"

    def _content(self) -> dict[str, Any]:
        """What is stated and named. Stores without leading spaces do not speak of them, as before there were any."""
        content = asdict(self)
        if not self.leading_space:
            del content["leading_space"]
        return content


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
    leading_space: bool = False


class TokenStore:
    """A finished store, read through memory maps. A copy sent to another process maps the files anew."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path, self.manifest = path, manifest
        self._open_maps()

    @staticmethod
    def open(
        path: str | Path,
        *,
        verify: Verify = "once",
        tokenizer_hash: str | None = None,
    ) -> TokenStore:
        """Open the store at `path`, after the checks of `store_checks.py`.

        `verify="once"` compares every byte with its checksum, unless this machine has done so since the files were last
        written (`verification.py`); `"checksums"` does so in any case; `"structure"` never, for the further processes of a
        machine. Raises `UserError` if the store is missing, unreadable, incomplete, damaged, of another format version, or
        made with another tokenizer than that of `tokenizer_hash`.
        """
        folder = Path(path)
        try:
            manifest = _read_manifest(folder)
            for name, size in manifest.file_sizes.items():
                check_size(folder / name, size)
            if manifest.replies_checksum is not None:
                check_size(folder / f"{REPLIES}.bin", manifest.expected_sizes["word_starts.bin"])
            store = TokenStore(folder, manifest)
            if tokenizer_hash is not None:
                store._check_tokenizer_hash(tokenizer_hash)
            store._check()
            if verify != "structure":
                verify_files(folder, manifest, again=verify == "checksums")
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"token store '{folder}' cannot be read: {error.filename or folder}: {reason}"
            ) from error
        return store

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `UserError` for another tokenizer than the store's, and where the manifest gives it other special tokens.

        Manifests of version 0.1.0 have no checksum that would show the latter.
        """
        self._check_tokenizer_hash(tokenizer_hash(tokenizer))
        manifest = self.manifest
        found = (manifest.bos_id, manifest.eos_id, manifest.special_ids)
        expected = (tokenizer.bos_token_id, tokenizer.eos_token_id, tuple(sorted(special_ids(tokenizer))))
        if found != expected:
            raise UserError(
                f"'{self.path / MANIFEST}' is damaged (BOS, EOS and special ids are {found}, the tokenizer's "
                f"{expected}): {AGAIN}"
            )

    def _check_tokenizer_hash(self, found: str) -> None:
        if found != self.manifest.tokenizer_hash:
            raise UserError(
                f"token store '{self.path}' was made with another tokenizer ({self.manifest.tokenizer_hash}) than "
                f"this run's ({found}): prepare it again with the model's tokenizer"
            )

    @property
    def fingerprint(self) -> str:
        """A name of the store's content."""
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
        """How many documents have a prompt and a completion after it."""
        return int(((self.prompt_lengths > 0) & (self.prompt_lengths < self.lengths)).sum())

    @property
    def has_entities(self) -> bool:
        """Whether documents come with the spans of their entities."""
        return self.manifest.has_entities

    @property
    def has_replies(self) -> bool:
        """Whether documents come with the tokens of their replies."""
        return self.manifest.replies_checksum is not None

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

        Slice d is `[starts[d], starts[d] + lengths[d])` of document `ids[d]`, and becomes its piece `pieces[d]`. Entity
        numbers stay those of the complete document; prompt lengths are cut to the slice.
        """
        from bico_ds.documents import Documents

        ids, starts, lengths = (np.asarray(a, dtype=np.int64) for a in (ids, starts, lengths))
        begins = self._offsets[ids] + starts
        assert np.all((starts >= 0) & (begins + lengths <= self._offsets[ids + 1])), (
            "a slice leaves its document"
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = self._token_indices(begins, offsets)
        return Documents(
            token_ids=self._tokens[at].astype(np.int64),
            offsets=offsets,
            source=np.full(len(ids), source, dtype=np.int64),
            id=ids,
            piece=np.asarray(pieces, dtype=np.int64),
            prompt_length=np.clip(self._prompt_lengths[ids].astype(np.int64) - starts, 0, lengths),
            group=np.asarray(self._groups[ids], dtype=np.int64),
            word_starts=_read_bits(self._word_starts, at),
            entity_number=None if self._entities is None else self._entities[at].astype(np.int64),
            is_reply=None if self._replies is None else _read_bits(self._replies, at),
        )

    def _token_indices(
        self, begins: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> slice | NDArray[np.int64]:
        """Where the tokens of the slices lie in the store; slices without gaps between them are one slice."""
        lengths = np.diff(offsets)
        if len(begins) and np.array_equal(begins[1:], begins[:-1] + lengths[:-1]):
            return slice(int(begins[0]), int(begins[0] + offsets[-1]))
        return np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)

    def whole(self, ids: NDArray[np.int64], *, source: int = 0) -> Documents:
        """Read complete documents."""
        ids = np.asarray(ids, dtype=np.int64)
        zeros = np.zeros_like(ids)
        return self.read(ids, zeros, self._offsets[ids + 1] - self._offsets[ids], zeros, source=source)

    def _check(self) -> None:
        """Raise `UserError` for columns that cannot be those of a store."""
        check_columns(
            self.path,
            self.manifest.tokens,
            offsets=self._offsets,
            prompt_lengths=self._prompt_lengths,
            groups=self._groups,
            word_starts=self._word_starts,
        )

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open_maps()

    def _open_maps(self) -> None:
        dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._tokens = _map(self.path / "tokens.bin", dtype)
        self._offsets = _map(self.path / "offsets.bin", COLUMNS["offsets"])
        self._prompt_lengths = _map(self.path / "prompt_lengths.bin", COLUMNS["prompt_lengths"])
        self._groups = _map(self.path / "groups.bin", COLUMNS["groups"])
        self._word_starts = _map(self.path / "word_starts.bin", COLUMNS["word_starts"])
        self._replies = _map(self.path / f"{REPLIES}.bin", "u1") if self.has_replies else None
        self._entities = None
        if self.manifest.has_entities:
            self._entities = _map(self.path / "entity_numbers.bin", COLUMNS["entity_numbers"])


def provenance(source: str | None, licence: str | None) -> str | None:
    """The text of `PROVENANCE`: a line per thing that is known; None where nothing is."""
    given = {"source": source, "licence": licence}
    lines = [f"{name}: {' '.join(text.split())}\n" for name, text in given.items() if text]
    return "".join(lines) or None


def is_store(path: Path) -> bool:
    """Return whether a token store lies at `path`, complete or damaged."""
    return (path / MANIFEST).is_file() and any((path / f).is_file() for f in ("tokens.bin", "offsets.bin"))


def _read_manifest(folder: Path) -> StoreManifest:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no token store at '{folder}': make one with bico-ds prepare")
    if not file.is_file():
        raise UserError(f"'{folder}' is not a complete token store: it has no {MANIFEST}; prepare it again")
    try:
        content = read_object(file)
        version = content["format_version"]
    except JsonError as error:
        raise UserError(f"'{file}' is damaged ({error.reason}): {AGAIN}") from error
    except KeyError:
        raise UserError(f"'{file}' is damaged (it has no format_version): {AGAIN}") from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(f"token store '{folder}' has format {version!r:.50}, not {FORMAT_VERSION}: {AGAIN}")
    own_checksum = content.pop(_MANIFEST_CHECKSUM, None)
    if own_checksum is None:  # of version 0.1.0
        content.setdefault("further_checksums", {})
    if missing := {field.name for field in fields(StoreManifest)} ^ {"leading_space", *content}:
        raise UserError(f"'{file}' is damaged (fields {sorted(missing)}): {AGAIN}")
    if own_checksum is not None and own_checksum != _digest(content):
        raise UserError(f"'{file}' is damaged (its content has another checksum): {AGAIN}")
    if not isinstance(content["special_ids"], list):
        raise UserError(f"'{file}' is damaged (special_ids are no list): {AGAIN}")
    manifest = StoreManifest(**{**content, "special_ids": tuple(content["special_ids"])})
    check_manifest(manifest, file)
    return manifest


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of these values, in whatever order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_bits(bitmap: NDArray[np.uint8], at: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
    """Unpack bits: eight per byte, the lowest first."""
    if isinstance(at, slice):
        first = at.start & ~7
        bits = np.unpackbits(bitmap[first >> 3 : (at.stop + 7) >> 3], bitorder="little")
        return bits[at.start - first : at.stop - first].view(bool)
    return (bitmap[at >> 3] >> (at & 7).astype(np.uint8) & 1).view(bool)


def _map(path: Path, dtype: str | np.dtype) -> NDArray:
    """Memory-map a column, as a plain array (slices of np.memmap are slow); an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
