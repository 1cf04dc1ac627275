"""A token store of texts sampled from a model: sampled shard by shard, by any number of ranks, resumable.

While it works, `.NAME.preparing` stands beside the output with a file per finished shard. Texts are taken in the order of
their numbers until they have the tokens that were asked for, so the store does not depend on ranks, shards or
interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
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
from bico_ds.runtime import distributed

# A model that gives so many texts in a row without a new one among them has no more to give.
_FRUITLESS_TEXTS = 1_000


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
    """What a store holds, and what was left out of it: texts that ended at once, and exact repetitions."""

    texts: int
    tokens: int
    ended: int
    empty: int
    repeated: int

    def __str__(self) -> str:
        return (
            f"{self.texts:,} texts, {self.tokens:,} tokens; {self.ended:,} ended by themselves, the others were cut; "
            f"left out: {self.empty:,} that are empty, {self.repeated:,} that repeat another"
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

    def agreed(self, answer: bool) -> bool:
        """The answer of the first rank."""
        return bool(distributed.broadcast_object(answer)) if self.world_size > 1 else answer


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
) -> SampleReport | None:
    """Sample texts and write them as a token store, with the tokenizer and the text `provenance` in it. Collective.

    Several ranks need a file system in common. `load` gives the model, and is called only where texts are missing. Returns
    None on all ranks but the first. Raises `UserError` for an output that exists and is not replaced by `force`, and for a
    model that has no more different texts to give.
    """
    refuse_output(output, force=force)
    if share.rank > 0:
        share.wait()
        _sample_missing(load, spec, output.with_name(f".{output.name}.preparing"), share, None)
        return None
    console = Console(stderr=True)
    with work_folder(output, on_wait=lambda: console.print(f"another process is preparing {output}")) as work:
        refuse_output(output, force=force)  # that other process may have made it
        _drop_others(work, f"{spec.key} {share.batch_size}")
        share.wait()
        columns = (
            TextColumn("sampling"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(console, *columns, enabled=share.progress) as shown:
            chosen = _sample_missing(load, spec, work, share, shown)
        write_texts(chosen.texts, tokenizer, spec.start, output, provenance, force=force)
        shutil.rmtree(work)
    return chosen.report()


def _drop_others(work: Path, key: str) -> None:
    """Remove the shards that another call began: of another model, seed, length or batch size."""
    file = work / "key.json"
    if file.is_file() and file.read_text(encoding="utf-8") == key:
        return
    for part in work.glob("part-*"):
        part.unlink()
    write_atomically(file, key)


def _sample_missing(
    load: Callable[[], Model], spec: SampleSpec, work: Path, share: SampleShare, shown: Progress | None
) -> Chosen:
    """Sample shards, round after round of one per rank, until together they have enough tokens. Collective."""
    model, number, chosen = None, share.rank, Chosen(wanted=spec.tokens, stops=spec.stops)
    chosen.read(work)
    speed = _Speed(chosen.tokens, spec.tokens, shown)
    # What every rank reads may differ on a network file system: the first rank's word counts.
    while not share.agreed(chosen.tokens >= spec.tokens):
        path = _part(work, number)
        if not path.is_file():
            model = model or load()
            _sample_shard(model, spec, path, number, share)
        number += share.world_size
        share.wait()
        chosen.read(work)
        speed.show(chosen.tokens)
        if chosen.fruitless >= _FRUITLESS_TEXTS:
            raise UserError(
                f"the last {chosen.fruitless:,} texts that were sampled are empty or repeat others: the model has no more "
                f"than {chosen.tokens:,} tokens of different texts to give; ask for fewer, or begin texts with another token"
            )
    return chosen


class _Speed:
    """Shows how many tokens there are, how fast they come and how long the rest will take."""

    def __init__(self, before: int, wanted: int, shown: Progress | None) -> None:
        self._before, self._wanted, self._shown = before, wanted, shown
        self._started = time.monotonic()
        if shown is not None:
            shown.begin("sampling", total=wanted, completed=before)

    def show(self, tokens: int) -> None:
        if self._shown is None:
            return
        rate = max(1.0, (tokens - self._before) / (time.monotonic() - self._started))
        text = f"{tokens:,} of {self._wanted:,} tokens, {rate:,.0f} tokens/s"
        left = max(0, self._wanted - tokens) / rate
        self._shown.update(
            min(tokens, self._wanted), f"sampling: {text}, {timedelta(seconds=round(left))} left", text=text
        )


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
        np.savez(file, tokens=np.concatenate(texts).astype(np.int32), lengths=lengths)


class Chosen:
    """The texts that make the store: of the finished shards from the first on, different ones, until there are enough."""

    def __init__(self, *, wanted: int, stops: Sequence[int]) -> None:
        self.texts: list[NDArray[np.int32]] = []
        self.tokens = self.empty = self.repeated = 0
        self.fruitless = 0  # texts since the last one that was taken
        self._wanted, self._stops = wanted, frozenset(stops)
        self._shards, self._seen = 0, set[bytes]()

    def read(self, work: Path) -> None:
        """Read on, to the first shard that is missing."""
        while self.tokens < self._wanted and (path := _part(work, self._shards)).is_file():
            with np.load(path) as part:
                tokens, lengths = part["tokens"], part["lengths"]
            for text in np.split(tokens, np.cumsum(lengths)[:-1]):
                if self.tokens < self._wanted:
                    self._take(text)
            self._shards += 1

    def report(self) -> SampleReport:
        """What was taken, and what was not."""
        ended = sum(int(text[-1]) in self._stops for text in self.texts)
        return SampleReport(
            texts=len(self.texts), tokens=self.tokens, ended=ended, empty=self.empty, repeated=self.repeated
        )

    def _take(self, text: NDArray[np.int32]) -> None:
        name = hashlib.blake2b(text.tobytes(), digest_size=16).digest()
        is_empty, is_repeated = int(text[1]) in self._stops, name in self._seen
        self.empty += is_empty
        self.repeated += is_repeated and not is_empty
        if is_empty or is_repeated:
            self.fruitless += 1
            return
        self.fruitless = 0
        self._seen.add(name)
        self.texts.append(text)
        self.tokens += len(text)


def write_texts(
    texts: Iterable[NDArray[np.integer]],
    tokenizer: FastTokenizer,
    start: int,
    output: Path,
    provenance: str | None,
    *,
    force: bool = False,
) -> None:
    """Write texts that begin with the token `start` as a store, with their tokenizer."""
    begins, ends = word_boundaries(tokenizer)
    header = StoreHeader(
        vocab_size=vocabulary_size(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=tuple(sorted(special_ids(tokenizer))),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        add_bos=start == tokenizer.bos_token_id,
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
