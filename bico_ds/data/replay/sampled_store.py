"""A token store of texts sampled from a model: sampled shard by shard, by any number of ranks, resumable.

While it works, `.NAME.preparing` stands beside the output with a file per finished shard. Texts are taken in the order of
their numbers until they have the tokens that were asked for, so the store does not depend on ranks, shards or
interruptions.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_file, write_atomically
from bico_ds.common.progress import Progress
from bico_ds.data.exported_tokenizer import save_tokenizer
from bico_ds.data.prepare.merge import TOKENIZER
from bico_ds.data.prepare.output_folder import refuse_output, work_folder
from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.replay.sampling import Model, sample_texts
from bico_ds.data.store import StoreHeader
from bico_ds.data.tokenizer import (
    FastTokenizer,
    special_ids,
    tokenizer_hash,
    vocabulary_size,
    word_boundaries,
)


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What is sampled: texts of at most `most_tokens` tokens, begun with the token `start`, until there are `tokens`.

    `stops`: tokens that end a text. `model`: a name of the weights, for which finished shards are kept.
    """

    tokens: int
    most_tokens: int
    seed: int
    start: int
    stops: tuple[int, ...]
    model: str

    @property
    def key(self) -> str:
        """What finished shards depend on; not the number of tokens, so that a larger store goes on from a smaller one."""
        return json.dumps([self.most_tokens, self.seed, self.start, list(self.stops), self.model])


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What a store holds, and what was left out of it: texts without a token after the first, and exact repetitions."""

    texts: int
    tokens: int
    ended: int
    empty: int
    repeated: int

    def __str__(self) -> str:
        return (
            f"{self.texts:,} texts, {self.tokens:,} tokens; {self.ended:,} ended by themselves, the others were cut; "
            f"left out: {self.empty:,} without a token, {self.repeated:,} that repeat another"
        )


@dataclass(frozen=True, kw_only=True)
class SampleShare:
    """This rank's part of the work. Shards of `batch_size` texts are dealt out to the ranks in turn."""

    device: torch.device
    batch_size: int = 64
    rank: int = 0
    world_size: int = 1
    progress: bool = True

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


def start_token(tokenizer: FastTokenizer, asked: str = "auto") -> int:
    """The token that sampled texts begin with: BOS where the tokenizer has one, else EOS, the separator of documents.

    `asked`: `auto`, `bos`, `eos`, or a token. Raises `UserError` for one that the tokenizer does not have.
    """
    known = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if asked == "auto":
        found = known["eos"] if known["bos"] is None else known["bos"]
    else:
        found = known[asked] if asked in known else tokenizer.get_vocab().get(asked)
    if found is None:
        raise UserError(f"--separator {asked}: the tokenizer has no such token")
    return int(found)


def sample_store(
    load: Callable[[], Model],
    tokenizer: FastTokenizer,
    spec: SampleSpec,
    output: Path,
    share: SampleShare,
    *,
    provenance: str | None,
    force: bool = False,
) -> SampleReport:
    """Sample texts and write them as a token store, with the tokenizer and the text `provenance` in it. Collective.

    `load` gives the model, and is called only where texts are missing. Raises `UserError` for an output that exists and is
    not replaced by `force`.
    """
    refuse_output(output, force=force)
    if share.rank > 0:
        work = output.with_name(f".{output.name}.preparing")
        share.wait()
        _sample_missing(load, spec, work, share, None)
        share.wait()
        return _report(list(_chosen_texts(work, spec)), work, spec)
    console = Console(stderr=True)
    with work_folder(output, on_wait=lambda: console.print(f"another process is preparing {output}")) as work:
        _drop_others(work, spec)
        share.wait()
        columns = (
            TextColumn("sampling"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(console, *columns, enabled=share.progress) as shown:
            _sample_missing(load, spec, work, share, shown)
        share.wait()
        texts = list(_chosen_texts(work, spec))
        report = _report(texts, work, spec)
        _write(texts, tokenizer, spec, output, provenance, force=force)
        shutil.rmtree(work)
    return report


def _drop_others(work: Path, spec: SampleSpec) -> None:
    """Remove shards of another model, seed or length."""
    key = work / "key.json"
    if key.is_file() and key.read_text(encoding="utf-8") == spec.key:
        return
    for part in work.glob("part-*"):
        part.unlink()
    write_atomically(key, spec.key)


def _sample_missing(
    load: Callable[[], Model], spec: SampleSpec, work: Path, share: SampleShare, shown: Progress | None
) -> None:
    """Sample shards, round after round of one per rank, until all together have enough tokens. Collective."""
    model, number, started, before = None, 0, time.monotonic(), 0
    if shown is not None:
        shown.begin("sampling", total=spec.tokens)
    while (done := sum(len(text) for text in _chosen_texts(work, spec))) < spec.tokens:
        if number == 0:
            before = done
        elif shown is not None:
            rate = max(1.0, (done - before) / (time.monotonic() - started))
            line = f"{done:,} of {spec.tokens:,} tokens, {rate:,.0f} tokens/s, {(spec.tokens - done) / rate:,.0f} s left"
            shown.update(min(done, spec.tokens), line, text=line)
        own = number + share.rank
        path = _part(work, own)
        if not path.is_file():
            model = model or load()
            _sample_shard(model, spec, path, own, share)
        number += share.world_size
        share.wait()
        if number > 64 and done == 0:
            raise UserError("the model samples no text: every one ends at its first token")


def _part(work: Path, number: int) -> Path:
    return work / f"part-{number:07d}.npz"


def _sample_shard(model: Model, spec: SampleSpec, path: Path, number: int, share: SampleShare) -> None:
    first = number * share.batch_size
    texts = sample_texts(
        model,
        np.arange(first, first + share.batch_size),
        seed=spec.seed,
        start=spec.start,
        stops=spec.stops,
        most_tokens=spec.most_tokens,
        device=share.device,
    )
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, tokens=np.concatenate(texts).astype(np.int64), lengths=lengths)


def _chosen_texts(work: Path, spec: SampleSpec) -> Iterator[NDArray[np.int64]]:
    """The texts of the finished shards from the first on, different ones of two tokens or more, until there are enough."""
    tokens, seen = 0, set[bytes]()
    for text in _finished_texts(work):
        if tokens >= spec.tokens:
            return
        if len(text) > 1 and text.tobytes() not in seen:
            seen.add(text.tobytes())
            tokens += len(text)
            yield text


def _finished_texts(work: Path) -> Iterator[NDArray[np.int64]]:
    """Of the shards without a gap from the first on."""
    number = 0
    while (path := _part(work, number)).is_file():
        with np.load(path) as part:
            tokens, lengths = part["tokens"], part["lengths"]
        yield from np.split(tokens, np.cumsum(lengths)[:-1])
        number += 1


def _report(texts: list[NDArray[np.int64]], work: Path, spec: SampleSpec) -> SampleReport:
    read = empty = repeated = 0
    seen = set[bytes]()
    for text in _finished_texts(work):
        if read == len(texts):
            break
        if len(text) < 2:
            empty += 1
        elif text.tobytes() in seen:
            repeated += 1
        else:
            seen.add(text.tobytes())
            read += 1
    return SampleReport(
        texts=len(texts),
        tokens=sum(map(len, texts)),
        ended=sum(int(text[-1]) in spec.stops for text in texts),
        empty=empty,
        repeated=repeated,
    )


def _write(
    texts: list[NDArray[np.int64]],
    tokenizer: FastTokenizer,
    spec: SampleSpec,
    output: Path,
    provenance: str | None,
    *,
    force: bool,
) -> None:
    begins, ends = word_boundaries(tokenizer)
    header = StoreHeader(
        vocab_size=vocabulary_size(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=tuple(sorted(special_ids(tokenizer))),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        add_bos=spec.start == tokenizer.bos_token_id,
        # Those that were cut do not.
        add_eos=False,
    )
    with TokenStoreWriter(output, header, overwrite=force) as writer:
        for text in texts:
            word_starts = begins[text]
            word_starts[1:] |= ends[text[:-1]]
            writer.append(
                text,
                np.array([len(text)]),
                prompt_lengths=np.zeros(1, dtype=np.int64),
                groups=np.full(1, -1),
                word_starts=word_starts,
            )
        save_tokenizer(tokenizer, writer.beside(TOKENIZER))
        writer.note_provenance(provenance)
        writer.finish(with_checksums=[TOKENIZER])
