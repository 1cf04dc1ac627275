"""One rank of many, alone in its process: `bico_ds.training.start.train` from the first line to the last, on a fake group.

torch's fake process group sends nothing. An all-reduce leaves a rank its own value, an all-gather gives it that once for
every rank, and a broadcast leaves what was there. The last is mended here: rank 0, which runs first, keeps what it
broadcasts, and every other rank receives that. So a rank sees the shapes, the shares and the number of messages of a run
of so many ranks, and rank 0's decisions; sums over the ranks, and weights gathered under ZeRO-3, are not those of a run.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bico_ds.config.schema import Recipe
from bico_ds.runtime import distributed
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.meeting import processes
from bico_ds.runtime.meeting.messages import Verdict
from bico_ds.runtime.signals import StopFlag
from bico_ds.training import start
from bico_ds.training.trainer import Trainer

RANKS_PER_NODE = 8
START, LOOP = "start", "loop"


@dataclass(kw_only=True)
class Phase:
    """What a rank does in the start, or in the one step and its checkpoint.

    `calls`: of Python functions, where they are counted, and 0 elsewhere. `traffic`: by collective, how many and the bytes
    of all their buffers on this rank.
    """

    cpu_seconds: float = 0.0
    calls: int = 0
    traffic: dict[str, list[int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Report:
    """A rank's start in a run of `world_size` ranks; `grown_bytes`: by how much its memory exceeded that of the imports."""

    rank: int
    world_size: int
    micro_batches: int = 0
    grown_bytes: int = 0
    phases: dict[str, Phase] = field(default_factory=lambda: {START: Phase(), LOOP: Phase()})


class FakeRank(TorchDispatchMode):
    """This process as one rank: notes what it does, phase by phase, and receives what rank 0 has kept in `folder`."""

    def __init__(self, rank: int, world_size: int, folder: Path, *, counts_calls: bool) -> None:
        super().__init__()
        self.report = Report(rank=rank, world_size=world_size)
        self._file, self._counts_calls = folder / "broadcasts.pt", counts_calls
        self._phase = self.report.phases[START]
        self._kept: Iterator[Tensor] = iter(torch.load(self._file) if rank else ())
        self._sent: list[Tensor] = []

    def train(self, recipe: Recipe, run_folder: Path) -> Report:
        """Train the recipe's one step. Raises what `bico_ds.training.start.train` raises."""
        before = psutil.Process().memory_info().rss
        begin, loop = time.process_time(), Trainer.train

        def note_start_and_train(trainer: Trainer) -> str:
            nonlocal begin
            begin = self._end_phase(begin)
            self.report.micro_batches = len(trainer.loader.step(0).batches)
            self.report.grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            self._phase = self.report.phases[LOOP]
            return loop(trainer)

        Trainer.train = note_start_and_train  # type: ignore[method-assign, assignment]
        with self, self._fake_group(), self._counted():
            state = start.train(recipe, output_dir=run_folder, resume="none", stop=StopFlag())
        self._end_phase(begin)
        assert state == "done", state
        if self.report.rank == 0:
            torch.save(self._sent, self._file)
        return self.report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            note = self._phase.traffic.setdefault(func._opname, [0, 0])
            note[0] += 1
            note[1] += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            if func._opname == "broadcast_":
                self._broadcast(args[0][0])
        return result

    def _broadcast(self, tensor: Tensor) -> None:
        if self.report.rank == 0:
            self._sent.append(tensor.clone())
        else:
            tensor.copy_(next(self._kept))

    def _end_phase(self, begin: float) -> float:
        self._phase.cpu_seconds = (now := time.process_time()) - begin
        return now

    @contextmanager
    def _fake_group(self) -> Iterator[None]:
        """The launcher's environment, a store in which rank 0 has let the others in, and the fake backend for gloo."""
        rank, world_size = self.report.rank, self.report.world_size
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % RANKS_PER_NODE),
        }
        store, begin = dist.HashStore(), distributed_c10d.init_process_group
        if rank:
            store.set(distributed._VERDICT, Verdict(kind="", text="").to_json())
        for other in range(world_size):  # it waits until all have come
            store.set(processes._PROCESS.format(other), "")
        distributed.connect = partial(_connected, store)  # type: ignore[assignment]
        dist.init_process_group = partial(_begin_fake, begin)  # type: ignore[assignment]
        yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        def count(frame: Any, event: str, argument: Any) -> None:
            self._phase.calls += event in ("call", "c_call")

        if self._counts_calls:
            sys.setprofile(count)
        yield
        sys.setprofile(None)


def _connected(store: dist.Store, ranks: Ranks, *, timeout_minutes: float) -> dist.Store:
    return store


def _begin_fake(begin: Callable[..., None], backend: str, **options: Any) -> None:
    begin("fake", **options)


def alone(recipe: Recipe, rank: int, world_size: int, folder: Path, *, counts_calls: bool) -> Report:
    """Be this rank in a process of its own, forked with this one's imports; `folder` is that of all ranks of a run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(_train, recipe, rank, world_size, folder, counts_calls).result()


def _train(recipe: Recipe, rank: int, world_size: int, folder: Path, counts_calls: bool) -> Report:
    fake = FakeRank(rank, world_size, folder, counts_calls=counts_calls)
    return fake.train(recipe, folder / "run")
