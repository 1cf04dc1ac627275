"""The slowest rank of each interval that is logged, and a warning where it stays slow. On every rank: it gathers names."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bico_ds.runtime.distributed import Ranks, all_gather_objects
from bico_ds.runtime.nodes.failed_node import node_name
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, RunStart, StepReport

TAG = "speed/slowest_rank"
FACTOR = "speed/slowest_rank_factor"
# A rank is slow that works so many times as long as the others' median, in so many intervals in a row.
SLOW, INTERVALS = 1.5, 3


class SlowestRank(Callback):
    """Compares what the ranks worked themselves (`StepReport.own_seconds`): in lock-step their steps take equally long.

    `tell` shows the warning, once as long as the same rank stays slow. The nodes of the ranks go to run.json, as `hosts`.
    """

    def __init__(self, ranks: Ranks, folder: RunFolder, tell: Callback) -> None:
        self._ranks, self._folder, self._tell = ranks, folder, tell
        self._hosts: list[str] = []
        self._slow, self._intervals = -1, 0

    def on_start(self, start: RunStart) -> None:
        self._hosts = all_gather_objects(node_name())
        if self._ranks.is_first:
            try:
                self._folder.add_to_start(hosts=self._hosts)
            except OSError as error:  # a run goes on without it
                self._tell.on_message(f"run.json: the ranks' hosts are not in it: {error.strerror}")

    def of(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """The slowest rank of an interval, its own seconds in a step, and how many times the others' median they are.

        Nothing where the ranks' seconds are not known. To be called once for each interval, in order.
        """
        size = self._ranks.world_size  # a checkpoint may hold reports of another one
        # On GPUs nothing is known of the first step.
        known = [own for report in reports if len(own := report.own_seconds) == size and min(own) > 0]
        means = [statistics.fmean(of_rank) for of_rank in zip(*known, strict=True)]
        if not means:
            return {}
        slowest = max(range(len(means)), key=means.__getitem__)
        others = statistics.median(seconds for rank, seconds in enumerate(means) if rank != slowest)
        factor = means[slowest] / others
        self._watch(slowest, factor, means[slowest], reports[-1].step)
        return {TAG: slowest, "speed/slowest_rank_seconds": means[slowest], FACTOR: factor}

    def _watch(self, rank: int, factor: float, seconds: float, step: int) -> None:
        if factor < SLOW or rank != self._slow:
            self._slow, self._intervals = rank, 0
        self._intervals += factor >= SLOW
        if self._intervals == INTERVALS:
            self._tell.on_message(
                f"WARNING: step {step}: rank {rank} on {self._hosts[rank]} is slow: it works {seconds:.3g} s of each step, "
                f"{factor:.2g} times the median of the others, in {INTERVALS} intervals of monitor.every_steps in a row. "
                "All wait for it: look at its GPU's clocks and temperature, and at what else runs on that node"
            )
