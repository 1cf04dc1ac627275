"""From input shards to one token store: tokenize in processes, merge; can be killed at any moment and run
again.

While it works, ``.NAME.preparing/`` stands beside the output: a lock, and a small store for every
finished shard. A second run keeps those whose file, options and tokenizer are still the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bico_ds.common.errors import UserError
from bico_ds.common.files import recover_folder
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.prepare.encode import Encoder, EncoderSpec, encode_shard, spare_the_collector
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.merge import merge_parts
from bico_ds.data.prepare.progress import IngestProgress
from bico_ds.data.prepare.report import IngestReport, describe_passed_over
from bico_ds.data.prepare.shards import Shard
from bico_ds.data.store import FORMAT_VERSION, StoreHeader, refuse_output
from bico_ds.data.tokenizer import (
    load_tokenizer,
    special_ids,
    tokenizer_digest,
    tokenizer_hash,
    vocabulary_size,
    word_boundaries,
)

if TYPE_CHECKING:
    from bico_ds.data.tokenizer import FastTokenizer


class IngestFailure(RuntimeError):
    """The machine failed, not the user: disk full, a worker killed. Running again goes on where it
    stopped.
    """


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
) -> IngestReport:
    """Tokenize `shards` in order into a token store at `output`. The same input gives the same bytes.
    `passed_over` is what `find_inputs` left out, for the report.

    `processes`: None takes one per CPU core, never more than shards. Raises `UserError` for bad input (naming
    file and line), for a tokenizer that is not there or does not fit the options, for an output that exists without
    `force`, holds an input, is no store or cannot be written; `IngestFailure` when the machine fails.
    """
    refuse_output(output, force=force)
    if not shards:
        raise UserError("the input has no documents, its files are empty: no store was written")
    _refuse_own_input(output, shards)
    tokenizer = load_tokenizer(tokenizer_path)
    spec = encoder_spec(tokenizer, options, tokenizer_path)
    with (
        IngestProgress(len(shards), enabled=progress) as shown,
        _work_folder(output, shown) as work,
    ):
        for line in describe_passed_over(passed_over or {}):
            shown.print(f"passed over: {line}")
        recover_folder(output)
        refuse_output(output, force=force)  # another process may have finished it while this one waited
        parts = _claim(work, shards, spec, shown)
        try:
            _tokenize(shards, parts, spec, processes or _cores(), shown)
            shown.print(f"writing {output}")
            report = merge_parts(parts, output, spec, tokenizer, overwrite=force, passed_over=passed_over)
        except OSError as error:
            raise _disk_failure(error, output) from error
        except UserError:
            if all(part.exists() for part in parts):  # merging refused them: there is nothing to go on with
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)
    return report


def encoder_spec(
    tokenizer: FastTokenizer, options: IngestOptions, tokenizer_path: FolderOrHub
) -> EncoderSpec:
    """Collect what workers need; `UserError` where options and tokenizer do not fit."""
    if options.messages_field and not tokenizer.chat_template:
        raise UserError(f"tokenizer '{tokenizer_path}' has no chat template, which messages need")
    vocab_size = vocabulary_size(tokenizer) if options.vocab_size is None else options.vocab_size
    _check_special_ids(tokenizer, options, tokenizer_path, vocab_size)
    begins, ends = word_boundaries(tokenizer)
    header = StoreHeader(
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash(tokenizer),
        special_ids=tuple(sorted(special_ids(tokenizer))),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        add_bos=options.add_bos,
        add_eos=options.add_eos,
        has_entities=options.entities_field is not None,
    )
    return EncoderSpec(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        tokenizer_digest=tokenizer_digest(tokenizer, chat=options.messages_field is not None),
        header=header,
        begins_word=begins,
        ends_word=ends,
        options=options,
        chat_tokenizer=tokenizer_path if options.messages_field else None,
    )


def _check_special_ids(
    tokenizer: FastTokenizer, options: IngestOptions, tokenizer_path: FolderOrHub, vocab_size: int
) -> None:
    bos, added = tokenizer.bos_token_id, dict[str, int]()
    if options.add_bos and bos is None:
        raise UserError(
            f"tokenizer '{tokenizer_path}' has no BOS token: switch it off "
            "(--no-bos, or add_bos: false in the recipe)"
        )
    if options.add_bos and bos is not None:
        added["BOS"] = bos
    if options.add_eos:
        added["EOS"] = tokenizer.eos_token_id
    for name, index in added.items():
        if index >= vocab_size:
            raise UserError(
                f"--vocab-size {vocab_size}: tokenizer '{tokenizer_path}' has {name} at id {index}; give a "
                f"larger one, or --no-{name.lower()}"
            )


def _refuse_own_input(output: Path, shards: list[Shard]) -> None:
    """What is replaced at the end must not hold what is read."""
    inside = [s.path for s in shards if Path(s.path).resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(
            f"'{output}' holds the input '{inside[0]}', which --force would remove: choose another"
        )


@contextmanager
def _work_folder(output: Path, shown: IngestProgress) -> Iterator[Path]:
    """The folder of unfinished work, locked: one process at a time prepares an output."""
    work = output.with_name(f".{output.name}.preparing")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{output.parent}': {error.strerror}") from error
    lock = _lock(work, lambda: shown.print(f"another process is preparing {output}: waiting for it"))
    try:
        yield work
    finally:
        if work.exists() and not any(work.glob("part-*")):
            shutil.rmtree(work)
        os.close(lock)


def _lock(work: Path, announce_waiting: Callable[[], None]) -> int:
    """Wait for the lock; a folder that its last owner removed in the meantime is made again."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(work / "lock")):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _claim(work: Path, shards: list[Shard], spec: EncoderSpec, shown: IngestProgress) -> list[Path]:
    """Name the part of every shard by all it depends on, and remove what is none of them."""
    for left in work.glob(".*"):
        shutil.rmtree(left)
    settings = [FORMAT_VERSION, asdict(spec.options), asdict(spec.header), spec.tokenizer_digest]
    common = json.dumps(settings, sort_keys=True)
    names = [hashlib.sha256((common + repr(shard)).encode()).hexdigest()[:32] for shard in shards]
    parts = [work / f"part-{name}" for name in names]
    finished = list(work.glob("part-*"))
    for part in set(finished) - set(parts):
        shutil.rmtree(part)
    if kept := len(set(finished) & set(parts)):
        shown.print(f"going on after an interrupted run: {kept} of {len(shards)} shards are done")
    return parts


def _tokenize(
    shards: list[Shard], parts: list[Path], spec: EncoderSpec, processes: int, shown: IngestProgress
) -> None:
    """Encode every shard whose part is missing."""
    jobs = [(shard, part) for shard, part in zip(shards, parts, strict=True) if not part.exists()]
    done = len(shards) - len(jobs)
    if min(processes, len(jobs)) > 1:
        _tokenize_in_processes(jobs, done, spec, min(processes, len(jobs)), shown)
        return
    encoder = Encoder(spec) if jobs else None
    counts = [0, 0]
    for finished, (shard, part) in enumerate(jobs, start=done):

        def report(documents: int, tokens: int, finished: int = finished) -> None:
            counts[0] += documents
            counts[1] += tokens
            shown.count(finished, *counts)

        assert encoder is not None
        encode_shard(encoder, shard, part, report)


def _tokenize_in_processes(
    jobs: list[tuple[Shard, Path]], done: int, spec: EncoderSpec, processes: int, shown: IngestProgress
) -> None:
    context = multiprocessing.get_context("spawn")  # fork is not safe beside torch, gloo or CUDA
    counts = context.Array("q", 2)
    with ProcessPoolExecutor(processes, context, _start_worker, (spec, counts)) as pool:
        pending: set[Future[Any]] = {pool.submit(_work, shard, part) for shard, part in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done += 1
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
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder, _counts = Encoder(spec), counts


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(shard: Shard, part: Path) -> None:
    encode_shard(_encoder, shard, part, _count)


def _count(documents: int, tokens: int) -> None:
    with _counts.get_lock():
        _counts[0] += documents
        _counts[1] += tokens


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _disk_failure(error: OSError, output: Path) -> IngestFailure:
    free = shutil.disk_usage(output.parent).free
    return IngestFailure(
        f"cannot write {error.filename or output}: {error.strerror} ({free / 2**30:.1f} GiB free there); "
        "finished shards are kept: make room and run the same command again"
    )
