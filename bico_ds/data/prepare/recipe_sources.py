"""A recipe's sources to token stores: made once, then found again in `data.cache_dir`. Rank 0 calls this first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.facts import DERIVED_FORM_VERSION, FORM_VERSION, write_derived, write_facts
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.input_files import Inputs, find_inputs
from bico_ds.data.prepare.shards import SHARD_BYTES, plan_shards
from bico_ds.data.store import FORMAT_VERSION, TokenStore, Verify
from bico_ds.data.store_checks import AGAIN
from bico_ds.data.tokenizer import (
    FastTokenizer,
    legacy_tokenizer_digest,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_hash,
)

logger = logging.getLogger(__name__)

# Of a store's name before its fingerprint; with that, and the endings of what is being written, a file system takes it.
_MOST_NAME_BYTES = 160


def facts_folder(data: DataSpec) -> Path:
    """Return the folder of the embedded task's files under `data.cache_dir`, written at the first call.

    Raises `UserError` where it cannot be written, and for `data.facts` with more persons or variants than there are.
    """
    path = data.cache_dir.here() / f"facts-{_facts_fingerprint(data)}"
    _write_once(path, lambda folder: write_facts(data.facts, folder))
    return path


def _facts_file(source: SourceSpec, data: DataSpec) -> Path:
    """The file of an embedded source, written where it is not there yet."""
    assert source.facts is not None
    if source.derive is None:
        return facts_folder(data) / f"{source.facts}_train.jsonl"
    kind, derive = source.facts, source.derive
    path = data.cache_dir.here() / f"facts-{_facts_input(source, data)}"
    _write_once(path, lambda folder: write_derived(data.facts, kind, derive, folder / "train.jsonl"))
    return path / "train.jsonl"


def _write_once(path: Path, write: Callable[[Path], None]) -> None:
    with _cache_errors(path.parent):
        if path.exists():
            return
        try:
            with atomic_folder(path) as folder:
                write(folder)
        except OSError:
            if not path.exists():  # else another process was faster, and wrote the same
                raise


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"data.cache_dir: cannot write to '{folder}': {reason}; give another folder with data.cache_dir"
        ) from error


def prepare_source(
    source: SourceSpec,
    data: DataSpec,
    tokenizer_path: FolderOrHub,
    *,
    progress: bool = True,
    verify: Verify = "once",
    vocab_size: int | None = None,
) -> Path:
    """Return the token store of a source; one of kind `files` or `facts` is made when the cache lacks it.

    The cache is keyed by the files (path, size, time of change), the options, the tokenizer and, for chats, its template.
    A store that was there is checked as `TokenStore.open` does with `verify`. Raises `UserError` for bad input, for a cache
    that cannot be written and for a store that is missing or damaged; `IngestFailure` when the machine fails. `vocab_size`,
    where it is given, is that of a model which embeds fewer ids than the tokenizer has: texts may hold no others.
    """
    if source.store is not None:
        TokenStore.open(source.store.here(), verify=verify)
        return source.store.here()
    options = replace(_options(source), vocab_size=vocab_size)
    inputs = _inputs(source, data)
    tokenizer = load_tokenizer(tokenizer_path)
    names = _store_names(source, data, options, inputs, tokenizer)
    path, earlier = (data.cache_dir.here() / name for name in names)
    with _cache_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if earlier.exists():
            path = earlier
        is_made = path.exists()
    if is_made:
        check_cached(path, tokenizer_hash(tokenizer), verify)
        return path
    shards = plan_shards(inputs.files, text_by=options.text_by, shard_bytes=SHARD_BYTES)
    try:
        report = ingest(
            shards, options, tokenizer_path, path, progress=progress, passed_over=inputs.passed_over
        )
    except UserError:
        if not path.exists():  # else another process made it while this one waited
            raise
        return path
    for warning in report.warnings:
        logger.warning("warning: %s: %s", path, warning)
    return path


def _store_names(
    source: SourceSpec, data: DataSpec, options: IngestOptions, inputs: Inputs, tokenizer: FastTokenizer
) -> list[str]:
    """Name a store by all that it depends on, in a form that people recognize: as today, and as earlier versions did."""
    name = source.name or (f"facts-{source.facts}" if source.facts else inputs.files[0].name.split(".")[0])
    if source.name is None and source.derive is not None:
        name += f"-{source.derive}"
    name = name.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    key = {
        "format": FORMAT_VERSION,
        "options": _as_named(options),
        "input": _facts_input(source, data) if source.facts else list(map(_stamp, inputs.files)),
    }
    names = []
    for digest_of in (tokenizer_digest, legacy_tokenizer_digest):
        digest = digest_of(tokenizer, chat=options.messages_field is not None)
        # The digest does not cover BOS and EOS.
        key["tokenizer"] = [tokenizer_hash(tokenizer), digest]
        names.append(f"{name}-{_fingerprint(key)}")
    return names


def _as_named(options: IngestOptions) -> dict[str, Any]:
    """The options in the name of a store; later ones only where they are set, so that earlier stores are found."""
    later = {"entities_pattern": None, "derive": None, "leading_space": False}
    return {key: value for key, value in asdict(options).items() if key not in later or value != later[key]}


def _options(source: SourceSpec) -> IngestOptions:
    if source.facts is not None:
        return IngestOptions(
            prompt_field="prompt",
            completion_field="completion",
            group_field="group",
            add_bos=source.add_bos,
            add_eos=source.add_eos,
        )
    return IngestOptions(
        text_field=source.text_field,
        prompt_field=source.prompt_field,
        completion_field=source.completion_field,
        messages_field=source.messages_field,
        group_field=source.group_field,
        entities_field=source.entities_field,
        entities_pattern=source.entities_pattern,
        derive=source.derive,
        text_by=source.text_by,
        add_bos=source.add_bos,
        add_eos=source.add_eos,
        leading_space=source.leading_space,
    )


def _inputs(source: SourceSpec, data: DataSpec) -> Inputs:
    if source.facts is not None:
        return Inputs(files=[_facts_file(source, data)], passed_over={})
    return find_inputs([given.expanded() for given in source.files or []])


def _stamp(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def check_cached(path: Path, tokenizer: str, verify: Verify) -> None:
    """Raise `UserError`, which says that it is a cache, for a store that is damaged, or of another tokenizer."""
    try:
        TokenStore.open(path, verify=verify, tokenizer_hash=tokenizer)
    except UserError as error:
        problem = str(error).removesuffix(AGAIN).rstrip(";: ")
        raise UserError(f"{problem} (it is a cache: delete '{path}', and it is made again)") from error


def _facts_fingerprint(data: DataSpec) -> str:
    return _fingerprint({"form": FORM_VERSION, "spec": data.facts.model_dump()})


def _facts_input(source: SourceSpec, data: DataSpec) -> str:
    """What an embedded source's texts depend on, in short."""
    kept = f"{_facts_fingerprint(data)}{source.facts}"
    return kept if source.derive is None else f"{kept}-{source.derive}-{DERIVED_FORM_VERSION}"


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
