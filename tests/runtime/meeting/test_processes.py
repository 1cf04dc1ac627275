"""Which processes the ranks are, and on which nodes: without real nodes, by the names that SLURM would give."""

from __future__ import annotations

from torch.distributed import HashStore

from bico_ds.runtime.meeting.processes import RankProcesses


def test_the_node_of_ranks_that_are_lost_is_known(monkeypatch):
    """Also where each node has one rank, so that no neighbour can see that it is gone."""
    store = HashStore()
    for rank, node in enumerate(("n1", "n2", "n2")):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        processes = RankProcesses(store, rank, 3)
    processes.gone()  # as the watchdog asks again and again
    assert processes.first_node == "n1"
    assert [processes.node_of(ranks) for ranks in ([1, 2], [0], [0, 1])] == ["n2", "n1", None]
