#!/usr/bin/env python
"""Tokenization speed: ours from JSONL on disk to a finished token store, against bare `tokenizers` in memory.

    python tools/bench/tokenization.py [--processes 2] [--megabytes 48] [--json]

The other side is `Tokenizer.encode_batch_fast` (and `encode_batch` where ours needs offsets) on texts that
are in memory already, its result thrown away, in as many processes. Text: Python's own standard library,
cut into documents; tokenizer: a byte-level BPE of 16k trained on it. Sides take turns, the best of three
rounds counts; start-up of the processes is left out on both. The report's picture takes 0.1 s whatever the
size, which much less text than the default would show.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import this_checkout  # noqa: F401  first on sys.path
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bico_ds.common.command_line import Command
from bico_ds.data.prepare.encode_shard import encode_shard, spare_the_collector
from bico_ds.data.prepare.encoder import Encoder, EncoderSpec, encoder_spec
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.merge import merge_parts
from bico_ds.data.prepare.shards import Shard, plan_shards
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import FastTokenizer, load_tokenizer

_BATCH, _ROUNDS = 2048, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of documents."""

    name: str
    characters: int  # per document
    has_prompt: bool


@dataclass(frozen=True)
class Speed:
    """Runs per microsecond: by the clock, and of CPU time (which a busy machine does not distort)."""

    clock: float
    cpu: float


CASES = (
    Case(name="short documents (160 characters)", characters=160, has_prompt=False),
    Case(name="short, prompt and completion", characters=160, has_prompt=True),
    Case(name="long documents (8,000 characters)", characters=8000, has_prompt=False),
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--megabytes", type=int, default=48, help="text per case (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")


def run(options: Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism, on both sides
    rows = []
    with tempfile.TemporaryDirectory() as folder, _pool(options.processes) as pool:
        corpus = _corpus(options.megabytes << 20)
        tokenizer = _train_tokenizer(corpus[: 4 << 20], Path(folder) / "tokenizer")
        for case in CASES:
            rows += _measure(case, corpus, tokenizer, Path(folder), pool, options.processes)
    table = Table("case", "ours", "tokenizers", "ratio", title=f"M tokens/s, {options.processes} processes")
    for row in rows:
        table.add_row(row["name"], f"{row['ours']:.2f}", f"{row['other']:.2f}", f"{row['ratio']:.2f}")
    Console().print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


def _measure(
    case: Case, corpus: str, tokenizer: Path, folder: Path, pool: ProcessPoolExecutor, processes: int
) -> list[dict[str, Any]]:
    """Both sides in turn, the best of a few rounds of each."""
    texts = [corpus[i : i + case.characters] for i in range(0, len(corpus), case.characters)]
    texts = [text for text in texts if text[len(text) // 2 :].strip()]
    file = folder / "texts.jsonl"
    file.write_text("".join(_line(text, case) for text in texts), encoding="utf-8")
    options = IngestOptions(add_bos=False, add_eos=False)
    if case.has_prompt:
        options = replace(options, prompt_field="prompt", completion_field="completion")
    loaded = load_tokenizer(tokenizer)
    spec = encoder_spec(loaded, options, tokenizer)
    shards = plan_shards([file], text_by="line", shard_bytes=file.stat().st_size // (4 * processes))
    chunks = [texts[i :: 4 * processes] for i in range(4 * processes)]
    fastest = dict.fromkeys(("other", "ours"), Speed(clock=0.0, cpu=0.0))
    for turn in range(_ROUNDS):
        parts = [folder / f"{case.characters}-{case.has_prompt}-{turn}-{i}" for i in range(len(shards))]
        for side in fastest:
            started = time.perf_counter()
            if side == "other":
                cpu = sum(pool.map(_bare, repeat(spec.tokenizer_json), chunks, repeat(case.has_prompt)))
            else:
                cpu = sum(pool.map(_ours, repeat(spec), shards, parts))
                cpu += _merge(parts, folder / "store", spec, loaded)
            speed = Speed(clock=1e-6 / (time.perf_counter() - started), cpu=1e-6 / cpu)
            fastest[side] = Speed(*map(max, zip(astuple(fastest[side]), astuple(speed), strict=True)))
    tokens = TokenStore.open(folder / "store").manifest.tokens
    return [
        {
            "name": f"{case.name}, {unit}",
            **{side: tokens * getattr(speed, key) for side, speed in fastest.items()},
            "unit": "M tokens/s",
            "ratio": getattr(fastest["ours"], key) / getattr(fastest["other"], key),
        }
        for key, unit in (("clock", "by the clock"), ("cpu", "per CPU second"))
    ]


def _line(text: str, case: Case) -> str:
    half = len(text) // 2
    row = {"prompt": text[:half], "completion": text[half:]} if case.has_prompt else {"text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _bare(tokenizer_json: str, texts: list[str], offsets: bool) -> float:
    """Tokenize and throw away; returns CPU seconds."""
    started = time.process_time()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    for i in range(0, len(texts), _BATCH):
        encode(texts[i : i + _BATCH], add_special_tokens=False)
    return time.process_time() - started


def _ours(spec: EncoderSpec, shard: Shard, part: Path) -> float:
    """One shard to its part; returns CPU seconds."""
    started = time.process_time()
    encode_shard(Encoder(spec), shard, part)
    return time.process_time() - started


def _merge(parts: list[Path], store: Path, spec: EncoderSpec, tokenizer: FastTokenizer) -> float:
    """All parts to the finished store; returns CPU seconds."""
    started = time.process_time()
    merge_parts(parts, store, spec, tokenizer, overwrite=True)
    return time.process_time() - started


def _pool(processes: int) -> ProcessPoolExecutor:
    """A pool whose processes are up, so that nobody's time counts their start."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), spare_the_collector)
    list(pool.map(time.sleep, [0.5] * processes))
    return pool


def _corpus(characters: int) -> str:
    """Python's standard library as text."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.rglob("*.py")) if "site-packages" not in file.parts]
    corpus = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return (corpus * (characters // len(corpus) + 1))[:characters]


def _train_tokenizer(text: str, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[i : i + 1000] for i in range(0, len(text), 1000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
