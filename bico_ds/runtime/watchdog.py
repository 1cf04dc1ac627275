"""One thread per rank that sees what the main thread cannot: that it stands still, or that another rank has failed.

Ranks tell each other through the store of the process group, which a hanging collective does not block. A rank that is
killed tells nothing: its neighbours on the same machine see that its process is gone; of another machine's it is known that
it does not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store

from bico_ds.common.errors import RunError, UserError
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.lock import FencedError
from bico_ds.runtime.meeting.flight_recorder import write_flight_record
from bico_ds.runtime.meeting.messages import Failure
from bico_ds.runtime.meeting.processes import RankProcesses, is_gone
from bico_ds.runtime.nodes.failed_node import failure_facts, node_name, write_node_report
from bico_ds.runtime.output.process_output import TOLD
from bico_ds.runtime.run_folder import RunFolder

_logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
# After another rank's failure: most ranks run into it themselves, and report more than this thread can. After a stall:
# rank 0 waits as long for the others' stacks.
GRACE_SECONDS = 5.0
# The flight record is written within this time, or not at all.
RECORD_SECONDS = 3.0
_KEY = "bico_ds/failure"
_OF_A_COLLECTIVE = re.compile(r"gloo|nccl|c10d|connection (closed|reset)|broken pipe", re.IGNORECASE)


class Watchdog:
    """Ends this rank when any rank fails, or stands still for `minutes`.

    Of a stall, stacks and the last collectives of every rank are on file first; of a collective that fails and nobody knows
    why, the collectives.
    """

    def __init__(self, store: Store, ranks: Ranks, folder: RunFolder, *, minutes: float) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # torch has it, its stub has not
        self._ranks, self._folder = ranks, folder
        self._processes = RankProcesses(self._store, ranks.rank, ranks.world_size)
        self._limit = minutes * 60
        self._last: float | None = None
        self.cause: Failure | None = None  # once `report` knows it
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """The main thread has made progress; the clock runs from the first call until `close`."""
        self._last = time.monotonic()

    def report(self, error: BaseException) -> BaseException:
        """Tell the other ranks that this one fails, and stop watching: the main thread ends it, by its own exit code.

        Returns what the run has failed of: `error`, or, where a collective failed because another rank had failed before,
        one that names that rank. The first report counts. A thread left in the store would abort the process where the
        interpreter is taken down (SIGABRT, pytorch#179291), and would read of its end that rank 0 is gone.
        """
        self._closed.set()
        self._thread.join(GRACE_SECONDS)  # the store may be out of reach
        failure = Failure.of(error, self._ranks.rank, is_certain=not _may_be_anothers(error))
        cause = failure if failure.is_certain else self._cause(failure)
        if not cause.is_certain:
            self._write_flight_record()
        self._publish(cause)
        self._answer()
        self._report_node(cause)
        self.cause = cause
        if cause is failure:
            return error
        if not self._ranks.is_first:
            self._tell(cause)
        return UserError(str(cause)) if cause.code == UserError.exit_code else RunError(str(cause))

    def abandon(self, reason: str) -> None:
        """End this rank now, whatever the main thread is doing."""
        failure = Failure(rank=self._ranks.rank, text=reason)
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
            elif self._last is not None and time.monotonic() - self._last > self._limit:
                text = f"no progress for {self._limit:g} seconds (distributed.watchdog_minutes)"
                failure = Failure(rank=self._ranks.rank, text=text, stalled=True, is_certain=False)
                self._publish(failure)
                self._end(failure)

    def _failure_elsewhere(self) -> Failure | None:
        """What another rank has reported, or that one is gone, which the others are then told."""
        try:
            reported = self._reported()
            if reported is None and (gone := self._processes.gone()):
                self._publish(_of_gone(gone, node_name()))  # unless it has reported before
                reported = self._reported()
        except RuntimeError:  # torch's DistError: the store went with rank 0's process
            reported = _of_gone([0], self._processes.first_node)
        return reported if reported is not None and reported.rank != self._ranks.rank else None

    def _reported(self) -> Failure | None:
        if not self._store.check([_KEY]):
            return None
        return Failure.from_store(self._store.get(_KEY), world_size=self._ranks.world_size)

    def _cause(self, own: Failure) -> Failure:
        """Of what a collective failed here: what another rank reports, or one that is gone or silent; else `own`."""
        self._answer()
        deadline = time.monotonic() + 2 * POLL_SECONDS
        while time.monotonic() < deadline:
            found = self._failure_elsewhere()
            if found is not None and found.is_certain:
                return found
            time.sleep(POLL_SECONDS / 10)
        self._publish(own)
        silent = self._silent(own)
        return own if not silent else self._of_silent(silent, own)

    def _leave(self, failure: Failure) -> None:
        if not failure.stalled and self._closed.wait(GRACE_SECONDS):
            return
        self._end(failure)

    def _end(self, failure: Failure) -> None:
        if failure.stalled:
            write_stacks(self._stacks())
            self._write_flight_record()
        self._answer()
        self._report_node(failure)
        _logger.info("error: %s", failure, extra=TOLD)
        self._tell(failure)
        os._exit(failure.code)

    def _tell(self, failure: Failure) -> None:
        """Rank 0 tells the user; where it is gone itself, the next rank, and the first one of each node."""
        is_heir = self._ranks.rank == 1 or self._ranks.local_rank == 0
        if not self._ranks.is_first and not (failure.rank == 0 and is_heir):
            return
        silent = [] if failure.is_certain else self._silent(failure)
        if silent and not failure.stalled:
            failure = self._of_silent(silent, failure)
        where = f"; stacks in {self._stacks().parent}" if failure.stalled else ""
        where += f"; {_do_not_answer(silent)}" if failure.stalled and silent else ""
        print(f"error: {failure}{where}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, FencedError):
            self._folder.fail(f"{failure}{where}")
            self._folder.fail(f"{failure}{where}", **self.facts(failure))

    def facts(self, failure: Failure) -> dict[str, Any]:
        """What the state file keeps of a failure that may be a node's; may wait some seconds for that node."""
        if not self._concerns_nodes(failure):
            return {}
        return failure_facts(self._folder.logs, self._folder.lock.run_id, failure.rank, failure.host)

    def _concerns_nodes(self, failure: Failure) -> bool:
        """Whether a failure may be a node's, and the run folder is this start's to write it into."""
        return failure.code != UserError.exit_code and not self._folder.is_of_earlier_start()

    def _report_node(self, failure: Failure) -> None:
        """Once for each node, and for certain by the rank that fails, which ends first, or the next one if it is gone."""
        is_mine = self._ranks.local_rank == 0 or failure.rank in (self._ranks.rank, self._ranks.rank - 1)
        if is_mine and self._concerns_nodes(failure):
            write_node_report(self._folder.logs, self._folder.lock.run_id)

    def _stacks(self) -> Path:
        return self._folder.logs / f"stacks-rank-{self._ranks.rank}.txt"

    def _write_flight_record(self) -> None:
        write_flight_record(self._folder.logs, self._ranks.rank, seconds=RECORD_SECONDS)

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._processes.answer()

    def _silent(self, failure: Failure) -> list[int]:
        """The ranks that do not answer. Of a stall, they have not written their stacks: they would not learn of it any more
        if rank 0 did not wait, with whose process the store ends.
        """
        with contextlib.suppress(RuntimeError):
            but = () if failure.rank is None else (failure.rank,)
            return self._processes.silent(but=but, seconds=GRACE_SECONDS)
        return []

    def _of_silent(self, ranks: list[int], seen: Failure) -> Failure:
        host = None
        with contextlib.suppress(RuntimeError):
            host = self._processes.node_of(ranks)
        return Failure(rank=None, text=f"{_do_not_answer(ranks)} ({seen})", host=host)

    def _publish(self, failure: Failure) -> None:
        """The first report counts; one that is certain takes the place of one that is not."""
        with contextlib.suppress(RuntimeError):
            reported, before = self._reported(), ""
            if reported is not None and not reported.is_certain and failure.is_certain:
                reported, before = None, self._store.get(_KEY).decode()
            if reported is None:
                self._store.compare_set(_KEY, before, failure.to_json())


def _may_be_anothers(error: BaseException) -> bool:
    """Whether an error may only show that another rank has gone: one of a collective, or of the store."""
    if isinstance(error, UserError | RunError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, DistError) or _OF_A_COLLECTIVE.search(str(error)) is not None


def _of_gone(ranks: list[int], host: str | None) -> Failure:
    return Failure(rank=ranks[0], text=is_gone(ranks), host=host)


def _do_not_answer(ranks: list[int]) -> str:
    return (
        f"no answer of rank {', '.join(map(str, ranks))}: the process, or its node, is gone or stands still"
    )


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
