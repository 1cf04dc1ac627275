"""Build what the next steps need in background threads.

Threads, by measurement (docs/benchmarks/loader.md): batches are built by array operations that release the interpreter
lock, and threads have no trouble with CUDA, gloo or the memory maps that a fork would share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Serves `build(step)`; `workers` threads run up to `2 * workers` steps ahead. No workers: built on demand."""

    def __init__(self, build: Callable[[int], T], workers: int) -> None:
        self._build = build
        self._ahead = 2 * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._futures: dict[int, Future[T]] = {}
        self.wait_seconds = 0.0

    def get(self, step: int) -> T:
        """Return `build(step)`, or raise what it raised; the time spent here is added to `wait_seconds`."""
        begin = time.perf_counter()
        try:
            if self._pool is None:
                return self._build(step)
            wanted = range(step, step + self._ahead + 1)
            for stale in [known for known in self._futures if known not in wanted]:
                self._futures.pop(stale).cancel()
            for number in wanted:
                if number not in self._futures:
                    self._futures[number] = self._pool.submit(self._build, number)
            return self._futures.pop(step).result()
        finally:
            self.wait_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Stop the threads; steps not yet begun are forgotten."""
        self._futures.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
