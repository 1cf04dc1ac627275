"""One thread per rank that sees what the main thread cannot: that it stands still, or that another rank has failed.

Ranks tell each other through the store of the process group, which a hanging collective does not block.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import Store

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.lock import FencedError
from bico_ds.runtime.run_folder import RunFolder

POLL_SECONDS = 1.0
# After another rank's failure: most ranks run into it themselves, and report more than this thread can. After a stall:
# rank 0 waits as long for the others' stacks.
GRACE_SECONDS = 5.0
_KEY = "bico_ds/failure"
_ON_FILE = "bico_ds/stacks"  # how many ranks have written theirs


class Watchdog:
    """Ends this rank when any rank fails, or stands still for `minutes`: then stacks of every rank are on file first."""

    def __init__(self, store: Store, ranks: Ranks, folder: RunFolder, *, minutes: float) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # torch has it, its stub has not
        self._ranks, self._folder = ranks, folder
        self._limit = minutes * 60
        self._last: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """The main thread has made progress; the clock runs from the first call until `close`."""
        self._last = time.monotonic()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails, and stop watching: the main thread ends it, by its own exit code.

        The first report counts. A thread left in the store would abort the process where the interpreter is taken down
        (SIGABRT, pytorch#179291), and would read of its end that rank 0 is gone.
        """
        text, code = f"{type(error).__name__}: {error}", 1
        if isinstance(error, UserError | RunError):
            text, code = str(error), error.exit_code
        self._publish({"rank": self._ranks.rank, "text": text, "code": code, "stalled": False})
        self._closed.set()
        self._thread.join(GRACE_SECONDS)  # the store may be out of reach

    def abandon(self, reason: str) -> None:
        """End this rank now, whatever the main thread is doing."""
        failure = {"rank": self._ranks.rank, "text": reason, "code": 1, "stalled": False}
        self._publish(failure)
        self._end(failure)

    def close(self) -> None:
        """Stop watching; on every rank before the last barrier, because the store ends with rank 0."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            failure = self._failure_elsewhere()
            if failure is not None:
                self._leave(failure)
            if self._last is not None and time.monotonic() - self._last > self._limit:
                text = f"no progress for {self._limit:g} seconds (distributed.watchdog_minutes)"
                failure = {"rank": self._ranks.rank, "text": text, "code": 1, "stalled": True}
                self._publish(failure)
                self._end(failure)

    def _failure_elsewhere(self) -> dict[str, Any] | None:
        try:
            if not self._store.check([_KEY]):
                return None
            failure = json.loads(self._store.get(_KEY))
        except RuntimeError:  # torch's DistError: the store went with rank 0's process
            failure = {"rank": 0, "text": "the process is gone", "code": 1, "stalled": False}
        return failure if failure["rank"] != self._ranks.rank else None

    def _leave(self, failure: dict[str, Any]) -> None:
        if not failure["stalled"] and self._closed.wait(GRACE_SECONDS):
            return
        self._end(failure)

    def _end(self, failure: dict[str, Any]) -> None:
        stacks = self._folder.logs / f"stacks-rank-{self._ranks.rank}.txt"
        if failure["stalled"]:
            write_stacks(stacks)
            with contextlib.suppress(RuntimeError):
                self._store.add(_ON_FILE, 1)
        text = f"rank {failure['rank']}: {failure['text']}"
        if self._ranks.is_first:
            where = f"; stacks in {stacks.parent}" if failure["stalled"] else ""
            print(f"error: {text}{where}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError, FencedError):
                self._folder.fail(text)
            if failure["stalled"]:
                self._await_stacks()
        os._exit(failure["code"])

    def _await_stacks(self) -> None:
        """The store ends with rank 0's process, and ranks that have not looked since would not learn of the stall."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(RuntimeError):
            while self._store.add(_ON_FILE, 0) < self._ranks.world_size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 10)

    def _publish(self, failure: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_KEY, "", json.dumps(failure))


def write_stacks(path: Path) -> None:
    """The stacks of this process's threads, into a file, or where that cannot be written to stderr."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)  # it says of no write that it failed
        if path.stat().st_size > 0:
            return
    except OSError:
        pass
    faulthandler.dump_traceback(sys.stderr)
