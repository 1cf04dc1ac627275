"""Computing a teacher: the start model's distributions over the texts of a store, shard after shard, on several ranks.

Shape legend: N loss rows of a batch, V vocabulary, K stored tokens per row.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_file, checksum, flush_folder, publish_folder, sync, write_atomically
from bico_ds.common.progress import Progress
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.data.loading.sequences import Overlong, Sequences, cut_store
from bico_ds.data.prepare.output_folder import refuse_output, work_folder, work_of
from bico_ds.data.store import TokenStore
from bico_ds.data.teacher.stored import (
    FORMAT_VERSION,
    MANIFEST,
    ROWS,
    TeacherKey,
    TeacherManifest,
    first_rows,
    is_teacher_part,
    part_name,
    read_manifest,
)
from bico_ds.model.architecture import model_config
from bico_ds.model.build import TrainableModel
from bico_ds.model.weights.load import open_weights
from bico_ds.model.weights.sampled_fingerprint import sampled_fingerprint
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.runtime.distributed import Ranks

# Rows whose logits are in memory at a time.
_CHUNK_ROWS = 512
# Of a shard, at least: what an interruption costs each rank at most.
_SHARD_ROWS = 1 << 15
_KEY, _LOCK = "key.json", "lock"


@dataclass(frozen=True, kw_only=True)
class TextCut:
    """How documents are cut into sequences: as `data.capacity` and `data.overlong` of a recipe."""

    capacity: int
    overlong: Overlong


@dataclass(frozen=True, kw_only=True)
class TeacherTask:
    """What is to be computed: the distributions over `sequences`, the texts of `store`, that `key` describes."""

    store: TokenStore
    key: TeacherKey
    model_name: str
    sequences: Sequences

    @property
    def rows(self) -> int:
        return int(first_rows(self.sequences)[-1])

    @property
    def row_bytes(self) -> int:
        return self.key.row_dtype.itemsize

    @property
    def size(self) -> str:
        """The rows and what they take on the disk."""
        return f"{self.rows:,} rows of {self.row_bytes} bytes: {self.rows * self.row_bytes / 1e9:.2f} GB"


def find_tasks(
    spec: ModelSpec,
    stores: Sequence[TokenStore],
    cut: TextCut,
    folder: Path,
    *,
    top_k: int,
    force: bool = False,
) -> list[TeacherTask]:
    """What is missing of a teacher at `folder`: a task per store; all of them with `force`.

    Raises `UserError` where a store has ids past the model's vocabulary, where it has fewer than `top_k` of them, and where
    the teacher has another part over a store, without `force`.
    """
    config = model_config(spec)
    if top_k > config.vocab_size:
        raise UserError(f"--top-k {top_k}: the model's vocabulary has {config.vocab_size} tokens")
    assert spec.path is not None
    model = sampled_fingerprint(config, open_weights(spec.path.here()))
    tasks = []
    for store in stores:
        if (largest := store.manifest.max_token_id) >= config.vocab_size:
            raise UserError(
                f"store '{store.path}' has token {largest}, and the model's vocabulary ends at {config.vocab_size - 1}"
            )
        key = TeacherKey(
            store=store.fingerprint,
            capacity=cut.capacity,
            overlong=cut.overlong,
            model=model,
            vocabulary=config.vocab_size,
            dtype=spec.dtype,
            top_k=top_k,
        )
        part = folder / part_name(store)
        if not force and (found := read_manifest(part)) is not None and found.key == key:
            continue
        refuse_output(part, force=force, is_ours=is_teacher_part)
        sequences = cut_store(store, longest=cut.capacity, overlong=cut.overlong)
        tasks.append(TeacherTask(store=store, key=key, model_name=str(spec.path), sequences=sequences))
    return tasks


@torch.no_grad()
def likeliest(model: TrainableModel, batch: PackedBatch, key: TeacherKey) -> NDArray[np.void]:
    """Return the rows [N] of `rows.bin` for a batch's targets, in their order.

    Logits in the model's dtype, as in training, and their softmax in fp32.
    """
    rows = np.zeros(len(batch.targets), dtype=key.row_dtype)
    hidden, weight = model.target_states(batch), model.causal_lm.lm_head.weight
    for start in range(0, len(hidden), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        log_probs = torch.mm(hidden[part], weight.T).float().log_softmax(-1)
        best = log_probs.topk(key.top_k)
        rows["ids"][part] = best.indices.cpu().numpy()
        rows["log_probs"][part] = best.values.cpu().numpy()
        others = log_probs.scatter(1, best.indices, -torch.inf).logsumexp(-1)
        rows["rest"][part] = others.cpu().numpy()
        rows["target"][part] = log_probs.gather(1, batch.targets[part, None])[:, 0].cpu().numpy()
    return rows


def prepare_parts(
    load: Callable[[], TrainableModel],
    tasks: Sequence[TeacherTask],
    folder: Path,
    ranks: Ranks,
    *,
    batch_tokens: int,
    force: bool = False,
) -> None:
    """Compute the rows of these tasks and write each as a part of the teacher at `folder`. Collective.

    `load` gives the model, on this rank's device; it is called where rows are missing. An interrupted call goes on after its
    last finished shards. Raises `UserError` where the disk has no room.
    """
    load = functools.cache(load)
    for task in tasks:
        output = folder / part_name(task.store)
        with _work(output, ranks) as work:
            shards = _Shards(task, work)
            if ranks.is_first:
                _begin(work, task, shards)
            _wait(ranks)
            _compute_missing(load, task, shards, ranks, batch_tokens)
            _wait(ranks)
            if ranks.is_first:
                _publish(work, output, task, force=force)
        _wait(ranks)


def _work(output: Path, ranks: Ranks) -> AbstractContextManager[Path]:
    if not ranks.is_first:
        return contextlib.nullcontext(work_of(output))
    note = f"another process is preparing {output}"
    return work_folder(output, on_wait=lambda: Console(stderr=True).print(note), parts="*.bin")


def _wait(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()


class _Shards:
    """The shards of a task: sequence after sequence, of `_SHARD_ROWS` rows or a little more.

    Finished ones wait as `0000012.bin` until all before them are appended to `rows.bin`.
    """

    def __init__(self, task: TeacherTask, work: Path) -> None:
        rows = first_rows(task.sequences)
        cuts = np.searchsorted(rows, np.arange(0, rows[-1], _SHARD_ROWS))
        # None of sequences of one token alone, which have no rows.
        self.cuts = np.append(np.unique(cuts[rows[cuts] < rows[-1]]), len(rows) - 1)
        self._bytes = rows[self.cuts] * task.row_bytes
        self._work, self._all = work, work / ROWS

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def path(self, number: int) -> Path:
        return self._work / f"{number:07d}.bin"

    @property
    def appended(self) -> int:
        """How many shards are in `rows.bin`."""
        size = self._all.stat().st_size if self._all.is_file() else 0
        return min(int(np.searchsorted(self._bytes, size, side="right")) - 1, len(self))

    def drop_rest(self) -> None:
        """Cut off what was being appended when the last process ended."""
        with open(self._all, "ab") as file:
            file.truncate(int(self._bytes[self.appended]))

    def append(self) -> None:
        """Append the finished shards that follow."""
        number = self.appended
        while number < len(self) and self.path(number).is_file():
            with open(self._all, "ab") as file, open(self.path(number), "rb") as shard:
                shutil.copyfileobj(shard, file)
            sync(self._all)
            self.path(number).unlink()
            number += 1

    def missing_bytes(self) -> int:
        return int(self._bytes[-1] - self._bytes[self.appended])


def _begin(work: Path, task: TeacherTask, shards: _Shards) -> None:
    """Remove the shards of another task, and refuse what the disk has no room for."""
    key, file = json.dumps(asdict(task.key)), work / _KEY
    if not file.is_file() or file.read_text(encoding="utf-8") != key:
        for old in work.glob("*.bin"):
            old.unlink()
        write_atomically(file, key)
    shards.drop_rest()
    missing, free = shards.missing_bytes(), shutil.disk_usage(work).free
    if missing > free:
        raise UserError(
            f"{work.parent}: the distributions take {missing / 1e9:.1f} GB, {task.row_bytes} bytes per token, and the disk "
            f"has {free / 1e9:.1f} GB free: give a smaller --top-k, or another --output"
        )


def _compute_missing(
    load: Callable[[], TrainableModel], task: TeacherTask, shards: _Shards, ranks: Ranks, batch_tokens: int
) -> None:
    """Compute shards, round after round of one per rank; the first rank appends them. Collective."""
    first, started = shards.appended, time.monotonic()
    _wait(ranks)
    if first == len(shards):
        return
    # On every rank: loading compares checksums over all of them.
    model = load().eval()
    columns = (TextColumn("computing"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(Console(stderr=True), *columns, enabled=ranks.is_first) as shown:
        shown.begin("computing", total=len(shards), completed=first)
        for number in range(first, len(shards), ranks.world_size):
            own = number + ranks.rank
            if own < len(shards) and not shards.path(own).is_file():
                _compute(model, task, shards, own, ranks.device, batch_tokens)
            _wait(ranks)
            if ranks.is_first:
                shards.append()
                done = min(number + ranks.world_size, len(shards))
                left = (time.monotonic() - started) / (done - first) * (len(shards) - done)
                line = f"{done:,} of {len(shards):,} shards, {left:,.0f} s left"
                shown.update(done, line, text=line)


def _compute(
    model: TrainableModel,
    task: TeacherTask,
    shards: _Shards,
    number: int,
    device: torch.device,
    batch_tokens: int,
) -> None:
    begin, end = shards.cuts[number : number + 2].tolist()
    with atomic_file(shards.path(number)) as temporary, open(temporary, "wb") as file:
        for numbers in _batches(task.sequences.length[begin:end].astype(np.int64), begin, batch_tokens):
            documents = task.sequences.read(numbers, task.store, source=0)
            batch = _NEXT_TOKENS.build(documents, BatchKey(seed=0, epoch=0))
            likeliest(model, batch.to(device), task.key).tofile(file)


_NEXT_TOKENS = NextTokenPrediction(spec=NtpSpec(kind="ntp", probability=1.0))


def _batches(lengths: NDArray[np.int64], first: int, tokens: int) -> Iterator[NDArray[np.int64]]:
    """The numbers from `first` on of sequences of these lengths, as many at a time as have `tokens`, at least one."""
    ends, begin = np.cumsum(lengths), 0
    while begin < len(lengths):
        before = ends[begin] - lengths[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield np.arange(first + begin, first + end)
        begin = end


def _publish(work: Path, output: Path, task: TeacherTask, *, force: bool) -> None:
    manifest = TeacherManifest(
        format_version=FORMAT_VERSION,
        key=task.key,
        model_name=task.model_name,
        rows=task.rows,
        checksum=checksum(work / ROWS, "sha256"),
    )
    write_atomically(work / MANIFEST, manifest.to_json())
    for name in (_KEY, _LOCK):
        (work / name).unlink()
    flush_folder(work)
    publish_folder(work, output, replace=force)
