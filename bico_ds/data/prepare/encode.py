"""One shard of the input to tokens: what a worker process does. Imports no torch, but for chats (transformers does)."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.prepare.examples import Example, IngestOptions, make_example
from bico_ds.data.prepare.shards import BadRow, Shard, read_records
from bico_ds.data.store import StoreHeader, TokenStoreWriter

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer

DIGESTS, SKIPPED, RESULT = "digests.bin", "skipped.jsonl", "result.json"
DIGEST_BYTES = 16
# Small enough that a batch's encodings and lists are still in the cache when they are read and freed:
# 2048 rows took 5 to 8 % longer, 64 pay for their array calls.
_BATCH_ROWS, _BATCH_CHARS = 256, 4_000_000


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What a worker needs to tokenize, small enough to be sent to it once."""

    tokenizer_json: str
    tokenizer_digest: str
    header: StoreHeader
    begins_word: NDArray[np.bool_]  # [vocabulary]: the token begins with white space
    ends_word: NDArray[np.bool_]  # [vocabulary]: the token ends with white space
    options: IngestOptions
    chat_tokenizer: FolderOrHub | None = None  # where to load the tokenizer with the chat template


@dataclass(kw_only=True)
class ShardResult:
    """What became of a shard's rows."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # by reason


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Documents in columns: T tokens of D documents."""

    tokens: NDArray[np.int64]  # [T]
    lengths: NDArray[np.int64]  # [D]
    prompt_lengths: NDArray[np.int64]  # [D]
    groups: NDArray[np.int64]  # [D]
    word_starts: NDArray[np.bool_]  # [T]
    entity_numbers: NDArray[np.int64] | None  # [T]


class Encoder:
    """Tokenizes texts in batches."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Byte-level post-processors trim white space out of offsets, which hides where a prompt ends; BOS and
        # EOS are put in by `_columns`.
        self._tokenizer.post_processor = None
        self._chat = _load_chat(spec.chat_tokenizer)

    def example(self, row: dict[str, Any] | BadRow) -> Example:
        """Make the text of a row; `BadRow` where there is none."""
        if isinstance(row, BadRow):
            raise row
        return make_example(row, self.spec.options, self._chat)

    def encode(self, examples: list[Example]) -> tuple[Encoded, dict[int, BadRow]]:
        """Tokenize a batch. Returns the good documents, and by place in the batch what is wrong with the
        others.
        """
        texts = [example.text for example in examples]
        if self._needs_offsets:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        else:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        tokens, lengths = _flatten(ids)
        bad = self._check(tokens, lengths)
        if bad:
            good = [place for place in range(len(ids)) if place not in bad]
            encodings, examples = [encodings[i] for i in good], [examples[i] for i in good]
            tokens, lengths = _flatten([ids[i] for i in good])
        return self._columns(tokens, lengths, encodings, examples), bad

    @property
    def _needs_offsets(self) -> bool:
        options = self.spec.options
        return bool(options.prompt_field or options.messages_field or options.entities_field)

    def _check(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[int, BadRow]:
        limit, bad = self.spec.header.vocab_size, {}
        for place in np.flatnonzero(lengths == 0).tolist():
            bad[place] = BadRow("empty document", "the text has no tokens")
        for position in np.flatnonzero(tokens >= limit)[::-1].tolist():
            place = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
            detail = f"id {tokens[position]}, the vocabulary has {limit}"
            bad[place] = BadRow("token id past the vocabulary", detail)
        return bad

    def _columns(
        self,
        text_tokens: NDArray[np.int64],
        text_lengths: NDArray[np.int64],
        encodings: list[Encoding],
        examples: list[Example],
    ) -> Encoded:
        """Put BOS and EOS around the texts, and fill the other columns."""
        header = self.spec.header
        first = np.cumsum(text_lengths) - text_lengths
        # A chat template may have written them already.
        bos = ((text_tokens[first] != header.bos_id) & header.add_bos).astype(np.int64)
        last = first + self._last_tokens(text_lengths, encodings, examples)
        eos = ((text_tokens[last] != header.eos_id) & header.add_eos).astype(np.int64)
        lengths = bos + text_lengths + eos
        starts = np.cumsum(lengths) - lengths
        at = np.arange(len(text_tokens)) + np.repeat(starts + bos - first, text_lengths)
        tokens = np.full(int(lengths.sum()), header.eos_id, dtype=np.int64)
        tokens[at] = text_tokens
        if header.bos_id is not None:
            tokens[starts[bos == 1]] = header.bos_id
        entities = None
        if header.has_entities:
            entities = np.zeros(len(tokens), dtype=np.int64)
            entities[at] = np.concatenate(
                [_entity_numbers(*pair) for pair in zip(encodings, examples, strict=True)]
            )
        return Encoded(
            tokens=tokens,
            lengths=lengths,
            prompt_lengths=self._prompt_lengths(text_lengths, lengths, bos, encodings, examples),
            groups=np.fromiter((x.group for x in examples), dtype=np.int64, count=len(examples)),
            word_starts=self._word_starts(tokens, starts),
            entity_numbers=entities,
        )

    def _last_tokens(
        self, lengths: NDArray[np.int64], encodings: list[Encoding], examples: list[Example]
    ) -> NDArray[np.int64]:
        """Where each text's last token is. Chat templates may end a turn with EOS and a line end: of chats,
        the last before white space.
        """
        if self.spec.options.messages_field is None:
            return lengths - 1
        last = [_last_token(*pair) for pair in zip(encodings, examples, strict=True)]
        return np.array(last, dtype=np.int64)

    def _prompt_lengths(
        self,
        text_lengths: NDArray[np.int64],
        lengths: NDArray[np.int64],
        bos: NDArray[np.int64],
        encodings: list[Encoding],
        examples: list[Example],
    ) -> NDArray[np.int64]:
        """Of a text that is all prompt, the EOS behind it is no completion."""
        if not self._needs_offsets:
            return np.zeros(len(examples), dtype=np.int64)
        prompts = [_prompt_tokens(*pair) for pair in zip(encodings, examples, strict=True)]
        counts = np.array(prompts, dtype=np.int64)
        return np.where(counts == text_lengths, lengths, np.where(counts > 0, counts + bos, 0))

    def _word_starts(self, tokens: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        word_starts = self.spec.begins_word[tokens]
        word_starts[1:] |= self.spec.ends_word[tokens[:-1]]
        word_starts[starts] = True
        return word_starts


def encode_shard(
    encoder: Encoder,
    shard: Shard,
    part: Path,
    report: Callable[[int, int], None] = lambda documents, tokens: None,
) -> ShardResult:
    """Write the documents of a shard as a token store at `part`, with digests and skipped rows beside.

    The folder appears when it is complete. `report(documents, tokens)` is called after every batch that has documents.
    Raises `UserError` naming file and line at the first bad row, unless the options say to skip, and in any case for a
    file that is damaged or changes meanwhile.
    """
    result = ShardResult()
    with TokenStoreWriter(part, encoder.spec.header) as writer, ExitStack() as files:
        digests = files.enter_context(writer.beside(DIGESTS).open("wb"))
        skipped = files.enter_context(writer.beside(SKIPPED).open("w", encoding="utf-8"))
        for rows in _batches(encoder, shard):
            good = _encode_batch(encoder, rows)
            for row in rows:
                if row.problem is not None:
                    _skip(encoder.spec.options, shard, row, result, skipped)
            if good is not None:
                writer.append(**good.__dict__)
                if encoder.spec.options.needs_digests:
                    digests.write(b"".join(_digest(row.example) for row in rows if row.example is not None))
                result.documents += len(good.lengths)
                result.tokens += len(good.tokens)
                report(len(good.lengths), len(good.tokens))
        write_atomically(writer.beside(RESULT), json.dumps(asdict(result)) + "\n")
        files.close()
        writer.finish()
    return result


def spare_the_collector() -> None:
    """For a process that only tokenizes: the millions of lists it makes have no cycles to look for.

    Measured on short documents: 8 % of the time.
    """
    gc.freeze()
    gc.set_threshold(1_000_000)


@dataclass(slots=True)
class _Row:
    """A row on its way: it has an example or a problem."""

    number: int
    raw: Any
    example: Example | None = None
    problem: BadRow | None = None


def _batches(encoder: Encoder, shard: Shard) -> Iterator[list[_Row]]:
    """Collect rows until a batch is worth a call of the tokenizer."""
    batch: list[_Row] = []
    chars = 0
    for number, content, raw in read_records(shard, encoder.spec.options.columns):
        row, stop = _Row(number, raw), False
        try:
            row.example = encoder.example(content)
            chars += len(row.example.text)
        except BadRow as problem:
            row.problem, stop = problem, encoder.spec.options.on_error == "stop"
        batch.append(row)
        if len(batch) >= _BATCH_ROWS or chars >= _BATCH_CHARS or stop:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode_batch(encoder: Encoder, rows: list[_Row]) -> Encoded | None:
    """Tokenize what has an example; rows that fail there get their problem."""
    tried = [row for row in rows if row.example is not None]
    if not tried:
        return None
    encoded, bad = encoder.encode([row.example for row in tried if row.example is not None])
    for place, problem in bad.items():
        tried[place].example, tried[place].problem = None, problem
    return encoded if len(encoded.lengths) else None


def _skip(options: IngestOptions, shard: Shard, row: _Row, result: ShardResult, file: TextIO) -> None:
    assert row.problem is not None
    if options.on_error == "stop":
        raise UserError(f"{shard.place(row.number)}: {row.problem}")
    reason = row.problem.reason
    result.skipped[reason] = result.skipped.get(reason, 0) + 1
    raw = row.raw.decode("utf-8", "backslashreplace") if isinstance(row.raw, bytes) else repr(row.raw)
    line = {"place": shard.place(row.number), "problem": str(row.problem), "raw": raw.rstrip("\r\n")}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _flatten(ids: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum())), lengths


def _prompt_tokens(encoding: Encoding, example: Example) -> int:
    """Tokens that end within the prompt; one that straddles its end predicts part of the answer."""
    if not example.prompt_chars:
        return 0
    token = _token_at(encoding, range(example.prompt_chars, len(example.text)))
    return len(encoding) if token is None else token


def _last_token(encoding: Encoding, example: Example) -> int:
    """The last token before trailing white space."""
    token = _token_at(encoding, range(len(example.text.rstrip()) - 1, -1, -1))
    return len(encoding) - 1 if token is None else token


def _entity_numbers(encoding: Encoding, example: Example) -> NDArray[np.int64]:
    """Number of the entity each token belongs to, from 1; 0 outside. A token that touches a span is
    inside.
    """
    numbers = np.zeros(len(encoding), dtype=np.int64)
    for number, (start, end) in enumerate(example.entities or (), start=1):
        first, last = (
            _token_at(encoding, range(start, end)),
            _token_at(encoding, range(end - 1, start - 1, -1)),
        )
        if first is not None and last is not None:
            # A character of several bytes can be several tokens, and the first of them was found.
            while (after := encoding.token_to_chars(last + 1)) is not None and after[0] < end:
                last += 1
            numbers[first : last + 1] = number
    return numbers


def _token_at(encoding: Encoding, characters: range) -> int | None:
    """The first token of the first of these characters that has one: normalizers can remove characters."""
    return next((t for t in map(encoding.char_to_token, characters) if t is not None), None)


def _digest(example: Example) -> bytes:
    return blake2b(example.text.encode(), digest_size=DIGEST_BYTES).digest()


def _load_chat(path: FolderOrHub | None) -> FastTokenizer | None:
    if path is None:
        return None
    from bico_ds.data.tokenizer import load_tokenizer

    return load_tokenizer(path)
