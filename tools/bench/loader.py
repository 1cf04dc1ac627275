#!/usr/bin/env python
"""How fast batches are built, with masks and attention plans; and by threads or by processes.

    python tools/bench/loader.py [--json]

Part 1: one worker against transformers' `DataCollatorWithFlattening` on the same documents, which it is given
as ready Python lists (ours reads them from the token store). It has no masks: its NTP speed stands against
our BICO too. Tokens per second of CPU time, so that other work on the machine does not count.

Part 2: a main thread that is busy with small tensor operations takes batches from one background thread
(ours), and from one process (torch's DataLoader, spawned, around the same loader). Tokens per second of wall
time, the busy time included, and the share of the time that the main thread waited.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from bico_ds.common.command_line import Command
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare, RankStep
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.store import StoreHeader, TokenStore
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.schedule import ObjectiveSchedule

CAPACITY, BINS = 2048, 4
SPECS: dict[str, ObjectiveSpec] = {
    "NTP": NtpSpec(kind="ntp"),
    "BICO, tokens at 15 %": BicoSpec.model_validate({"kind": "bico"}),
    "BICO, spans at 40 %": BicoSpec.model_validate({"kind": "bico", "mask": {"rate": 0.4, "unit": "span"}}),
    "BICO, words at 15 %": BicoSpec.model_validate({"kind": "bico", "mask": {"unit": "word"}}),
}


def make_store(folder: Path, mean: int, tokens: int = 8_000_000) -> TokenStore:
    """Write a store of documents of about `mean` tokens (exactly, at 2048)."""
    rng = np.random.default_rng(0)
    count = tokens // mean
    lengths = np.full(count, mean) if mean == CAPACITY else rng.integers(mean // 2, mean * 3 // 2 + 1, count)
    header = StoreHeader(
        vocab_size=32_000,
        tokenizer_hash="bench",
        special_ids=(0, 1, 2),
        bos_id=1,
        eos_id=2,
        add_bos=False,
        add_eos=False,
    )
    with TokenStoreWriter(folder / f"mean{mean}", header) as writer:
        total = int(lengths.sum())
        zeros = np.zeros(count, dtype=np.int64)
        words = rng.random(total) < 0.7
        writer.append(
            rng.integers(3, 32_000, total), lengths, prompt_lengths=zeros, groups=zeros, word_starts=words
        )
        writer.finish()
    return TokenStore.open(folder / f"mean{mean}")


def make_loader(store: TokenStore, spec: ObjectiveSpec, workers: int) -> ElasticLoader:
    """One rank, BINS micro-batches of one bin per step."""
    tokens = TokenRoles(special_ids=(0, 1, 2), placeholder_id=0, vocabulary=32_000)
    data = {"sources": [{"store": str(store.path)}], "capacity": CAPACITY, "workers": workers}
    stream = StreamSpec(
        stores=[store],
        data=DataSpec.model_validate(data),
        schedule=ObjectiveSchedule(build_objectives([spec], tokens), [1.0], seed=1),
        seed=1,
        global_batch_bins=BINS,
        vocabulary=tokens.vocabulary,
    )
    return ElasticLoader(stream, RankShare())


def tokens_per_second(step: Callable[[int], RankStep], seconds: float = 1.5) -> float:
    """Return million tokens per CPU second of `step`, called in order for so long."""
    step(0)
    done, number, begin = 0, 1, time.process_time()
    while time.process_time() - begin < seconds:
        done += sum(batch.represented_tokens for batch in step(number).batches)
        number += 1
    return done / (time.process_time() - begin) / 1e6


def collator_speed(store: TokenStore, loader: ElasticLoader) -> float:
    """Return million tokens per CPU second of the flattening collator on the documents of the first steps."""
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    bins = [
        [{"input_ids": d.token_ids.tolist()} for d in store.whole(batch.documents[:, 1].numpy())]
        for step in range(20)
        for batch in loader.step(step).batches
    ]
    tokens = sum(len(feature["input_ids"]) for features in bins for feature in features)
    begin = time.process_time()
    for features in bins:
        collate(features, return_tensors="pt")
    return tokens / (time.process_time() - begin) / 1e6


class Steps(IterableDataset):
    """The loader's steps, for a DataLoader process."""

    def __init__(self, store: TokenStore, spec: ObjectiveSpec) -> None:
        self._store, self._spec = store, spec

    def __iter__(self) -> Iterator[RankStep]:
        loader, step = make_loader(self._store, self._spec, workers=0), 0
        while True:
            yield loader.step(step)
            step += 1


def busy_consumer(
    step: Callable[[int], RankStep], matrix: torch.Tensor, seconds: float = 4.0
) -> tuple[float, float]:
    """Take steps on a main thread that does 20 ms of small tensor operations between them.

    Returns million tokens/s and the share of the time that it waited.
    """
    step(0)
    done, waited, number, begin = 0, 0.0, 1, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        asked = time.perf_counter()
        done += sum(batch.represented_tokens for batch in step(number).batches)
        waited += time.perf_counter() - asked
        number += 1
    seconds = time.perf_counter() - begin
    return done / seconds / 1e6, waited / seconds


def measure(folder: Path) -> list[dict[str, Any]]:
    """Measure both parts."""
    rows = []
    for mean in (39, CAPACITY):
        store = make_store(folder, mean)
        other = collator_speed(store, make_loader(store, SPECS["NTP"], workers=0))
        for name, spec in SPECS.items():
            ours = tokens_per_second(make_loader(store, spec, workers=0).step)
            rows.append(row(f"{mean}-token documents: {name}", ours, other))
        rows += measure_waiting(store, SPECS["BICO, tokens at 15 %"], mean)
    return rows


def measure_waiting(store: TokenStore, spec: ObjectiveSpec, mean: int) -> list[dict[str, Any]]:
    """Measure a busy main thread with a background thread and with a background process."""
    matrix = torch.randn(64, 64)
    threaded = make_loader(store, spec, workers=1)
    ours, our_wait = busy_consumer(threaded.step, matrix)
    threaded.close()
    steps = DataLoader(
        Steps(store, spec), batch_size=None, num_workers=1, multiprocessing_context="spawn", prefetch_factor=2
    )
    processes = iter(steps)
    theirs, their_wait = busy_consumer(lambda _: next(processes), matrix)
    processes._shutdown_workers()  # type: ignore[attr-defined]
    name = f"{mean}-token documents, busy main thread"
    return [
        row(f"{name}: thread against process", ours, theirs),
        row(f"{name}: share of time waiting", our_wait, their_wait, "share"),
    ]


def row(name: str, ours: float, other: float, unit: str = "M tokens/s") -> dict[str, Any]:
    """One line of the table."""
    return {"name": name, "ours": ours, "other": other, "unit": unit, "ratio": ours / other}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: Namespace) -> None:
    """Measure, print the table, and with --json a last line for machines."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    table = Table("what", "ours", "other", "unit", "ratio")
    for line in rows:
        table.add_row(
            line["name"], f"{line['ours']:.3g}", f"{line['other']:.3g}", line["unit"], f"{line['ratio']:.3g}"
        )
    Console(width=120).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
