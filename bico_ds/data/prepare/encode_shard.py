"""One shard of the input to a small store of its own: what a worker process does."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.data.prepare.derived_texts import NothingDerivedError
from bico_ds.data.prepare.encoder import Encoded, Encoder
from bico_ds.data.prepare.examples import Example, IngestOptions
from bico_ds.data.prepare.input_files import printable
from bico_ds.data.prepare.records import BadRecord, read_records
from bico_ds.data.prepare.shards import Shard
from bico_ds.data.prepare.store_writer import TokenStoreWriter

DIGESTS, SKIPPED, RESULT, GROUPS = "digests.bin", "skipped.jsonl", "result.json", "groups_seen.bin"
DIGEST_BYTES = 16
# Small enough that a batch's encodings and lists are still in the cache when they are read and freed:
# 2048 records took 5 to 8 % longer, 64 pay for their array calls.
_BATCH_RECORDS, _BATCH_CHARS = 256, 4_000_000


SPECIAL_TOKENS = "have special tokens written out in their text, which become control tokens"
NOT_FOUND = "have an assistant's turn that is not found in what the chat template wrote: loss_on: replies leaves it out"
LEFT_OUT = "have a message whose content the chat template leaves out, or a part of the last reply"

GIVES_NONE = "give no derived text"


@dataclass(kw_only=True)
class Notice:
    """How many documents are to be looked at for one reason, and where the first is."""

    count: int
    first: str


@dataclass(kw_only=True)
class ShardResult:
    """What became of a shard's records."""

    documents: int = 0
    tokens: int = 0
    # Records by reason.
    skipped: dict[str, int] = field(default_factory=dict)
    # Documents by reason.
    notices: dict[str, Notice] = field(default_factory=dict)

    def notice(self, reason: str, where: str) -> None:
        """Count a document that is to be looked at."""
        self.notices.setdefault(reason, Notice(count=0, first=where)).count += 1


def encode_shard(
    encoder: Encoder,
    shard: Shard,
    part: Path,
    report: Callable[[int, int], None] = lambda documents, tokens: None,
) -> ShardResult:
    """Write the documents of a shard as a token store at `part`, with their digests, groups and the skipped records in it.

    The folder appears when it is complete. `report(documents, tokens)` is called after every batch that has documents.
    Raises `UserError` naming file and line at the first bad record, unless the options ask to skip it, and in any case for a
    file that is damaged or changes meanwhile.
    """
    result = ShardResult()
    has_replies = encoder.spec.options.has_replies
    with (
        TokenStoreWriter(part, encoder.spec.header, has_replies=has_replies) as writer,
        ExitStack() as files,
    ):
        digests = files.enter_context(writer.beside(DIGESTS).open("wb"))
        skipped = files.enter_context(writer.beside(SKIPPED).open("w", encoding="utf-8"))
        for batch in _batches(encoder, shard):
            good = _encode_batch(encoder, batch)
            for item in batch:
                if item.problem is not None:
                    _skip(encoder.spec.options, shard, item, result, skipped)
                else:
                    _notice(shard, item, result)
            if good is not None:
                writer.append(**good.__dict__)
                if encoder.spec.options.needs_digests:
                    examples = (item.example for item in batch if item.example is not None)
                    digests.write(b"".join(map(_digest, examples)))
                result.documents += len(good.lengths)
                result.tokens += len(good.tokens)
                report(len(good.lengths), len(good.tokens))
        write_atomically(writer.beside(RESULT), json.dumps(asdict(result)) + "\n")
        np.array(sorted(encoder.take_groups()), dtype="<u8").tofile(writer.beside(GROUPS))
        files.close()
        writer.finish(with_checksums=(DIGESTS, SKIPPED, RESULT, GROUPS))
    return result


def spare_the_collector() -> None:
    """Make the garbage collector run rarely, in a process that only tokenizes: its millions of lists have no cycles.

    Measured on short documents: 8 % of the time.
    """
    gc.freeze()
    gc.set_threshold(1_000_000)


@dataclass(slots=True)
class _Item:
    """A text in a batch, or a record without one: it has an example, a problem, or a reason why it gives no text."""

    number: int
    raw: Any
    example: Example | None = None
    problem: BadRecord | None = None
    special_token: str | None = None
    # Why nothing is derived from it.
    gives_none: str | None = None


def _batches(encoder: Encoder, shard: Shard) -> Iterator[list[_Item]]:
    """Collect records until a batch is worth a call of the tokenizer."""
    batch: list[_Item] = []
    chars = 0
    for number, content, raw in read_records(shard, encoder.spec.options.columns):
        stop = False
        try:
            for example in encoder.examples(content):
                batch.append(_Item(number, raw, example))
                chars += len(example.text)
        except BadRecord as problem:
            batch.append(_Item(number, raw, problem=problem))
            stop = encoder.spec.options.on_error == "stop"
        except NothingDerivedError as reason:
            batch.append(_Item(number, raw, gives_none=str(reason)))
        if len(batch) >= _BATCH_RECORDS or chars >= _BATCH_CHARS or stop:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode_batch(encoder: Encoder, batch: list[_Item]) -> Encoded | None:
    """Tokenize what has an example; what fails there gets its problem."""
    tried = [item for item in batch if item.example is not None]
    if not tried:
        return None
    encoded, bad, written_out = encoder.encode([item.example for item in tried if item.example is not None])
    for index, token in written_out.items():
        tried[index].special_token = token
    for index, problem in bad.items():
        tried[index].example, tried[index].problem = None, problem
    return encoded if len(encoded.lengths) else None


def _skip(options: IngestOptions, shard: Shard, item: _Item, result: ShardResult, file: TextIO) -> None:
    assert item.problem is not None
    if options.on_error == "stop":
        raise UserError(f"{shard.where(item.number)}: {item.problem}")
    reason = item.problem.reason
    result.skipped[reason] = result.skipped.get(reason, 0) + 1
    raw = item.raw.decode("utf-8", "backslashreplace") if isinstance(item.raw, bytes) else repr(item.raw)
    line = {"place": shard.where(item.number), "problem": str(item.problem), "raw": raw.rstrip("\r\n")}
    file.write(printable(json.dumps(line, ensure_ascii=False)) + "\n")


def _notice(shard: Shard, item: _Item, result: ShardResult) -> None:
    if item.gives_none is not None:
        result.notice(f"{GIVES_NONE} ({item.gives_none})", shard.where(item.number))
        return
    assert item.example is not None
    if item.special_token is not None:
        result.notice(SPECIAL_TOKENS, f"{shard.where(item.number)}, {item.special_token!r}")
    if item.example.left_out:
        result.notice(LEFT_OUT, f"{shard.where(item.number)}, message {item.example.left_out}")
    if item.example.not_found:
        result.notice(NOT_FOUND, f"{shard.where(item.number)}, message {item.example.not_found}")


def _digest(example: Example) -> bytes:
    return blake2b(example.text.encode(), digest_size=DIGEST_BYTES).digest()
