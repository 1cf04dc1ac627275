"""What must hold in every token store, checked at each open: fields of the manifest, sizes of files, columns.

It reads the columns that have an entry per document, and none that has one per token: `verification.py` reads those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError

if TYPE_CHECKING:
    from bico_ds.data.store import StoreManifest

AGAIN = "prepare it again with --force"
_SHA256 = re.compile("[0-9a-f]{64}")
_LARGEST_VOCABULARY = {"uint16": 2**16, "uint32": 2**32}
_DOCUMENTS_AT_ONCE = 1 << 22  # bounds the memory of a check


def check_manifest(manifest: StoreManifest, file: Path) -> None:
    """Raise `UserError` for a field of another type than it must have, or outside its range, and for other files."""
    for problem in _problems(manifest):
        raise UserError(f"'{file}' is damaged ({problem}): {AGAIN}")


def _problems(manifest: StoreManifest) -> Iterator[str]:
    numbers = {
        name: getattr(manifest, name) for name in ("documents", "tokens", "max_token_id", "vocab_size")
    }
    numbers |= {"eos_id": manifest.eos_id, "bos_id": 0 if manifest.bos_id is None else manifest.bos_id}
    numbers |= {f"special_ids[{index}]": number for index, number in enumerate(manifest.special_ids)}
    for name, number in numbers.items():
        if type(number) is not int or number < (-1 if name == "max_token_id" else 0):
            yield f"{name} is {number!r:.50}, no count"
    for name in ("add_bos", "add_eos", "has_entities", "leading_space"):
        if type(getattr(manifest, name)) is not bool:
            yield f"{name} is {getattr(manifest, name)!r:.50}, neither true nor false"
    if type(manifest.tokenizer_hash) is not str:
        yield f"tokenizer_hash is {manifest.tokenizer_hash!r:.50}, no text"
    if manifest.token_dtype not in ("uint16", "uint32"):
        yield f"token_dtype is {manifest.token_dtype!r:.50}, neither uint16 nor uint32"
    elif not 1 <= manifest.vocab_size <= _LARGEST_VOCABULARY[manifest.token_dtype]:
        yield f"vocab_size {manifest.vocab_size} with tokens of {manifest.token_dtype}"
    written = {
        "max_token_id": manifest.max_token_id,
        "eos_id": manifest.eos_id if manifest.add_eos else 0,
        "bos_id": manifest.bos_id if manifest.add_bos else 0,
    }
    for name, number in written.items():
        if number is None or number >= manifest.vocab_size:
            yield f"{name} is {number}, with vocab_size {manifest.vocab_size}"
    yield from _file_problems(manifest)


def _file_problems(manifest: StoreManifest) -> Iterator[str]:
    expected: dict[str, Any] = manifest.expected_sizes
    if manifest.file_sizes != expected or any(type(size) is not int for size in manifest.file_sizes.values()):
        yield f"file_sizes are {manifest.file_sizes!r:.200}, {expected} by the counts"
    for field in ("checksums", "further_checksums"):
        checksums = getattr(manifest, field)
        if not isinstance(checksums, dict):
            yield f"{field} is {checksums!r:.50}, no mapping"
            return
        for name, checksum in checksums.items():
            if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
                yield f"{field} has {checksum!r:.50} for {name}, no SHA-256"
    if set(manifest.checksums) != set(expected):
        yield f"checksums are of {sorted(manifest.checksums)}, the files are {sorted(expected)}"


def check_size(file: Path, size: int) -> None:
    """Raise `UserError` where a file is missing or has another size, in bytes."""
    if not file.is_file():
        raise UserError(f"token store '{file.parent}' is incomplete: {file.name} is missing; {AGAIN}")
    if (found := file.stat().st_size) != size:
        raise UserError(
            f"token store '{file.parent}' is damaged: {file.name} has {found} bytes, {size} by its "
            f"manifest; {AGAIN}"
        )


def check_columns(
    folder: Path,
    tokens: int,
    *,
    offsets: NDArray[np.int64],
    prompt_lengths: NDArray[np.int32],
    groups: NDArray[np.int64],
    word_starts: NDArray[np.uint8],
) -> None:
    """Raise `UserError` unless these columns can be those of a store of so many tokens.

    Documents lie in order, without gaps, from the first token to the last; prompts lie in their documents; a group is a
    number from 0, or −1; the bits after the last token are 0.
    """

    def refuse(column: str, problem: str) -> None:
        raise UserError(f"token store '{folder}' is damaged: {column}.bin: {problem}; {AGAIN}")

    if offsets[0] != 0 or offsets[-1] != tokens:
        refuse("offsets", f"it goes from {offsets[0]} to {offsets[-1]}, the tokens from 0 to {tokens}")
    for start in range(0, len(prompt_lengths), _DOCUMENTS_AT_ONCE):
        part = slice(start, start + _DOCUMENTS_AT_ONCE)
        begins, ends = offsets[:-1][part], offsets[1:][part]
        # No difference is taken: it may overflow.
        if len(bad := np.flatnonzero((begins > ends) | (begins < 0))):
            document = start + int(bad[0])
            refuse("offsets", f"document {document} ends before it begins")
        prompts = prompt_lengths[part]
        if len(bad := np.flatnonzero((prompts < 0) | (prompts > ends - begins))):
            document, length = start + int(bad[0]), int((ends - begins)[bad[0]])
            problem = (
                f"document {document} of {length} tokens (by offsets.bin) has a prompt of {prompts[bad[0]]}"
            )
            refuse("prompt_lengths", problem)
        if len(bad := np.flatnonzero(groups[part] < -1)):
            refuse("groups", f"document {start + int(bad[0])} has group {groups[part][bad[0]]}")
    if tokens % 8 and word_starts[-1] >> tokens % 8:
        refuse("word_starts", f"it has words after the last of {tokens} tokens")
