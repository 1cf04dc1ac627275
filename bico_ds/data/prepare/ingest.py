"""From input shards to one token store: tokenize in processes, then merge. It can be killed at any moment and run again.

While it works, the folder `.NAME.preparing` stands beside the output: a lock, and a small store for every finished
shard. A second run keeps those whose file, options and tokenizer are still the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from bico_ds.common.errors import UserError
from bico_ds.common.files import recover_folder, remove_incomplete
from bico_ds.common.progress import Progress
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.prepare.encode_shard import encode_shard, spare_the_collector
from bico_ds.data.prepare.encoder import Encoder, EncoderSpec, encoder_spec
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.merge import merge_parts
from bico_ds.data.prepare.output_folder import refuse_output, work_folder
from bico_ds.data.prepare.report import IngestReport, describe_passed_over
from bico_ds.data.prepare.shards import Shard
from bico_ds.data.store import FORMAT_VERSION, TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.runtime.launch_environment import usable_cores

# Of what a shard's small store holds beside its columns.
_PART_VERSION = 5
LEAST_SECONDS = 1.0  # of tokenizing, for a speed to be told


class IngestFailure(RuntimeError):
    """The machine failed, not the user: disk full, a worker killed. Running again goes on where it stopped."""


def ingest(
    shards: list[Shard],
    options: IngestOptions,
    tokenizer_path: FolderOrHub,
    output: Path,
    *,
    force: bool = False,
    processes: int | None = None,
    progress: bool = True,
    passed_over: dict[str, list[str]] | None = None,
    provenance: str | None = None,
) -> IngestReport:
    """Tokenize `shards` in order into a token store at `output`. The same input gives the same bytes.

    `processes`: None takes one per CPU core, never more than shards. `passed_over` is what `find_inputs` left out, for the
    report; `provenance` a text that the store keeps. Raises `UserError` for bad input (naming file and line), for a
    tokenizer that is not there or does not fit the options, for an output that exists without `force`, holds an input,
    is no store or cannot be written; `IngestFailure` when the machine fails.
    """
    refuse_output(output, force=force)
    _check_shards(shards, output)
    tokenizer = load_tokenizer(tokenizer_path)
    spec = encoder_spec(tokenizer, options, tokenizer_path)
    waiting = f"another process is preparing {output}: waiting for it"
    with (
        _IngestProgress(len(shards), enabled=progress) as shown,
        work_folder(output, on_wait=lambda: shown.print(waiting)) as work,
    ):
        for line in describe_passed_over(passed_over or {}):
            shown.print(f"passed over: {line}")
        _restore_replaced(output)
        recover_folder(output)
        refuse_output(output, force=force)  # another process may have finished it while this one waited
        parts = _name_parts(work, shards, spec)
        _remove_leftovers(work, parts, shown)
        shown.print(f"input: {_size(shards)}; starting to tokenize …")
        try:
            _tokenize(shards, parts, spec, processes or usable_cores(), shown)
            tokenized, seconds = shown.tokenized, shown.seconds
            shown.print(f"writing {output}")
            report = merge_parts(
                parts,
                output,
                spec,
                tokenizer,
                overwrite=force,
                passed_over=passed_over,
                provenance=provenance,
            )
        except OSError as error:
            raise _disk_failure(error, output) from error
        except UserError:
            if all(part.exists() for part in parts):  # merging refused them: a second run would too
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)
    return replace(report, tokenized=tokenized, seconds=seconds)


def _size(shards: list[Shard]) -> str:
    files = {shard.path: shard.size for shard in shards}
    return f"{sum(files.values()) / 1e6:,.1f} MB in {len(files):,} file{'s' * (len(files) != 1)}"


def _restore_replaced(output: Path) -> None:
    """Put back the store that version 0.1.0 had moved aside, where it was killed before the new one took its place."""
    for replaced in output.parent.glob(f".{glob.escape(output.name)}.replaced-*"):
        if not output.exists():
            replaced.rename(output)


def _check_shards(shards: list[Shard], output: Path) -> None:
    """There must be input, and the output, which may be replaced at the end, must not hold it."""
    if not shards:
        raise UserError("the input has no documents, its files are empty: no store was written")
    inside = [s.path for s in shards if Path(s.path).resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(
            f"'{output}' holds the input '{inside[0]}', which --force would remove: choose another"
        )


def _name_parts(work: Path, shards: list[Shard], spec: EncoderSpec) -> list[Path]:
    """Name the small store of every shard by all that it depends on."""
    settings = [
        _PART_VERSION,
        FORMAT_VERSION,
        asdict(spec.options),
        asdict(spec.header),
        spec.tokenizer_digest,
    ]
    common = json.dumps(settings, sort_keys=True)
    names = [hashlib.sha256((common + repr(shard)).encode()).hexdigest()[:32] for shard in shards]
    return [work / f"part-{name}" for name in names]


def _remove_leftovers(work: Path, parts: list[Path], shown: _IngestProgress) -> None:
    """Remove what an earlier run left and this one cannot use."""
    remove_incomplete(work)
    for leftover in work.glob(".*.writing-*"):  # by version 0.1.0
        shutil.rmtree(leftover, ignore_errors=True)
    finished = set(work.glob("part-*"))
    for part in finished - set(parts):
        shutil.rmtree(part)
    kept = [part for part in sorted(finished & set(parts)) if _keep(part, shown)]
    if kept:
        shown.print(f"going on after an interrupted run: {len(kept)} of {len(parts)} shards are done")


def _keep(part: Path, shown: _IngestProgress) -> bool:
    """Whether a finished shard is as it was written; one that is not goes, and is made again."""
    try:
        TokenStore.open(part, verify="checksums")
    except UserError as error:
        shown.print(f"made again: {error}")
        shutil.rmtree(part)
        return False
    return True


def _tokenize(
    shards: list[Shard], parts: list[Path], spec: EncoderSpec, processes: int, shown: _IngestProgress
) -> None:
    """Encode every shard whose part is missing."""
    jobs = [(shard, part) for shard, part in zip(shards, parts, strict=True) if not part.exists()]
    done = len(shards) - len(jobs)
    if min(processes, len(jobs)) > 1:
        _tokenize_in_processes(jobs, done, spec, min(processes, len(jobs)), shown)
        return
    encoder = Encoder(spec) if jobs else None
    shown.ready(time.monotonic_ns())
    counts = [0, 0]
    for finished, (shard, part) in enumerate(jobs, start=done):

        def report(documents: int, tokens: int, finished: int = finished) -> None:
            counts[0] += documents
            counts[1] += tokens
            shown.count(finished, *counts)

        assert encoder is not None
        encode_shard(encoder, shard, part, report)


def _tokenize_in_processes(
    jobs: list[tuple[Shard, Path]], done: int, spec: EncoderSpec, processes: int, shown: _IngestProgress
) -> None:
    context = multiprocessing.get_context("spawn")  # fork is not safe beside torch, gloo or CUDA
    counts = context.Array("q", 3)
    with ProcessPoolExecutor(processes, context, _start_worker, (spec, counts)) as pool:
        pending: set[Future[Any]] = {pool.submit(_encode_job, shard, part) for shard, part in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done += 1
                shown.ready(counts[2])
                shown.count(done, counts[0], counts[1])
        except BrokenProcessPool as error:
            raise IngestFailure(
                "a tokenizing process was killed (out of memory?): try fewer with --processes; "
                "finished shards are kept, run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder
_counts: SynchronizedArray[int]


def _start_worker(spec: EncoderSpec, counts: SynchronizedArray[int]) -> None:
    global _encoder, _counts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    spare_the_collector()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder, _counts = Encoder(spec), counts
    with counts.get_lock():
        counts[2] = counts[2] or time.monotonic_ns()  # one clock for all processes of a machine


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_job(shard: Shard, part: Path) -> None:
    encode_shard(_encoder, shard, part, _count)


def _count(documents: int, tokens: int) -> None:
    with _counts.get_lock():
        _counts[0] += documents
        _counts[1] += tokens


def _disk_failure(error: OSError, output: Path) -> IngestFailure:
    free = shutil.disk_usage(output.parent).free
    return IngestFailure(
        f"cannot write {error.filename or output}: {error.strerror} ({free / 2**30:.1f} GiB free there); "
        "finished shards are kept: make room and run the same command again"
    )


class _IngestProgress(Progress):
    """Shows shards done, documents and tokens on stderr."""

    def __init__(self, shards: int, *, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        super().__init__(Console(stderr=True), *columns, enabled=enabled, transient=True)
        self._shards = shards
        # Tokens of this run, and the time that they took from when the first process was ready.
        self.tokenized, self.seconds = 0, 0.0
        self._ready_ns = 0
        self.begin("tokenizing", total=shards)

    def ready(self, at_ns: int) -> None:
        """The first process began to tokenize at this time of `time.monotonic_ns`; 0: none has yet."""
        self._ready_ns = at_ns

    def count(self, shards: int, documents: int, tokens: int) -> None:
        """Show counts so far; `documents` and `tokens` count this run's work only."""
        if not self._ready_ns:
            self.update(shards, "starting the tokenizing processes", text="starting its processes")
            return
        self.tokenized, self.seconds = tokens, (time.monotonic_ns() - self._ready_ns) / 1e9
        text = f"{shards}/{self._shards} shards, {documents:,} documents, {tokens / 1e6:,.1f} M tokens"
        if self.seconds >= LEAST_SECONDS:
            text += f", {tokens / self.seconds:,.0f} tokens/s"
        self.update(shards, f"tokenizing: {text}", text=text)
