"""Inputs, and stores made of them by the real ingestion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.input_files import find_files
from bico_ds.data.prepare.report import IngestReport
from bico_ds.data.prepare.shards import plan_shards
from bico_ds.data.store import TokenStore

TEXTS = [f"Number {i}: naïve café 北京 🙂, \t'quoted' {'word ' * (i % 17)}end." for i in range(60)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ingest_files(
    inputs: Path | list[Path], tokenizer: str, output: Path, *, shard_bytes: int = 1 << 20, **settings: Any
) -> IngestReport:
    force, processes = settings.pop("force", False), settings.pop("processes", 1)
    options = IngestOptions(**settings)
    files = find_files([str(path) for path in (inputs if isinstance(inputs, list) else [inputs])])
    shards = plan_shards(files, text_by=options.text_by, shard_bytes=shard_bytes)
    return ingest(shards, options, tokenizer, output, force=force, processes=processes, progress=False)


def contents(store: Path) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}


def all_documents(store: Path):
    opened = TokenStore.open(store, verify="checksums")
    return opened.whole(np.arange(len(opened)))
