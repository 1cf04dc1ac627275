"""Documents of a store as text, for reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.prepare.merge import TOKENIZER
from bico_ds.data.store import PROVENANCE, TokenStore, Verify
from bico_ds.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer
    from bico_ds.documents import Document


def describe_store(
    path: Path,
    *,
    documents: list[int] | None = None,
    tokenizer_path: FolderOrHub | None = None,
    verify: Verify = "once",
) -> Iterator[str]:
    """Yield lines: what the manifest has, then the documents decoded (default: the first ten).

    The tokenizer is the one kept in the store, unless `tokenizer_path` names another. Raises `UserError` for a tokenizer
    that differs from the store's, for a store that holds none where none is named, and for a document number that the
    store does not have.
    """
    store = TokenStore.open(path, verify=verify)
    if tokenizer_path is None and not (path / TOKENIZER).is_dir():
        raise UserError(
            f"store '{path}' does not hold its tokenizer: name the one it was made with by --tokenizer"
        )
    tokenizer = load_tokenizer(tokenizer_path or (path / TOKENIZER).resolve())
    store.check_tokenizer(tokenizer)
    numbers = documents if documents is not None else list(range(min(10, len(store))))
    if outside := [n for n in numbers if not 0 <= n < len(store)]:
        raise UserError(f"store '{path}' has documents 0 to {len(store) - 1}, not {outside[0]}")
    manifest = store.manifest
    yield f"{path}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.token_dtype})"
    yield f"vocabulary {manifest.vocab_size:,}, largest id {manifest.max_token_id:,}"
    yield f"tokenizer {manifest.tokenizer_hash}; BOS added: {manifest.add_bos}; EOS added: {manifest.add_eos}"
    if (file := path / PROVENANCE).is_file():
        yield from file.read_text(encoding="utf-8").splitlines()
    for document in store.whole(np.array(numbers, dtype=np.int64)):
        yield ""
        yield from _describe(document, tokenizer)


def _describe(document: Document, tokenizer: FastTokenizer) -> Iterator[str]:
    ids = document.token_ids.tolist()
    group = f", group {document.group}" if document.group >= 0 else ""
    yield f"document {document.id}: {len(ids):,} tokens{group}"
    if document.prompt_length:
        yield f"  prompt      {tokenizer.decode(ids[: document.prompt_length])!r}"
        yield f"  completion  {tokenizer.decode(ids[document.prompt_length :])!r}"
    else:
        yield f"  text        {tokenizer.decode(ids)!r}"
    for start, end in document.entity_spans if document.entity_spans is not None else ():
        yield f"  entity      {tokenizer.decode(ids[start:end])!r} (tokens {start} to {end - 1})"
    yield f"  tokens      {' '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))}"
