"""Runs of 64 and 256 ranks, as far as one machine can show them.

Three ways, each real where the others are not. The order of the data and the shares of the ranks need no group: every
rank's loader is asked. The start of `launch/train.py` runs whole, one rank at a time, on torch's fake process group
(tools/bench/one_of_many.py): it shows shapes, work, memory, and the number and size of messages. There a rank receives
what rank 0 broadcast, but sums over the ranks are its own value, and gathered weights its own slice again and again, so
that whatever the ranks compare by sums (loaded weights, a resumed state) is not shown. What ranks gather and
agree on is shown by 64 threads on torch's threaded process group, which moves the values.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.testing._internal.distributed import multi_threaded_pg

from bico_ds.cluster.preflight.check import preflight
from bico_ds.cluster.preflight.node_report import collect
from bico_ds.config.load import load_recipe
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.runtime import distributed
from bico_ds.runtime.launch_environment import free_port
from tests import ROOT
from tests.data.loading.loaders import stream_of
from tests.data.stores import write_store

BINS, STEPS = 512, (0, 7)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Enough documents of drawn lengths for a few global batches of 512 bins."""
    seed = random.randrange(2**32)
    print("seed", seed)
    store = write_store(
        tmp_path_factory.mktemp("many") / "store", np.random.default_rng(seed).integers(1, 64, 6000).tolist()
    )
    data = DataSpec(sources=[SourceSpec(store=str(store.path))], capacity=64, workers=0)
    return stream_of(([store], lambda: data), bins=BINS)


def documents_of_ranks(stream, world_size: int, micro: int, step: int) -> list[list[tuple[int, ...]]]:
    """The documents of a step, by rank; every rank has the same number of micro-batches."""
    found = []
    for rank in range(world_size):
        share = RankShare(rank=rank, world_size=world_size, micro_batch_bins=micro)
        batches = ElasticLoader(stream, share).step(step).batches
        assert len(batches) == BINS // world_size // micro
        found.append([tuple(document) for batch in batches for document in batch.documents.tolist()])
    return found


@pytest.mark.parametrize("step", STEPS)
def test_64_and_256_ranks_divide_the_batch_that_one_two_and_eight_ranks_have(stream, step):
    (whole,) = documents_of_ranks(stream, 1, 1, step)
    assert len(whole) == len(set(whole)) > BINS, "no document twice in a step"
    for world_size, micro in ((2, 2), (8, 1), (64, 4), (256, 2)):
        shares = documents_of_ranks(stream, world_size, micro, step)
        assert Counter(document for share in shares for document in share) == Counter(whole)
        assert all(shares), "a rank without a document"


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[int, list[dict]]:
    """What the bench measured of ranks' whole starts, by the number of ranks."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/bench/many_ranks.py"), "--worlds", "64", "256", "--calls", "--json"],
        cwd=tmp_path_factory.mktemp("starts"), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout.splitlines()[-1])["tables"]
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["rows"]]
    # Of each: rank 0, a drawn one, the last.
    return {world: [line for line in lines if line["ranks"] == world] for world in (64, 256)}


@pytest.mark.distributed
@pytest.mark.slow
def test_a_start_is_as_much_work_on_64_ranks_as_on_256(starts):
    """Messages, bytes and Python calls of a rank: where each is constant, all ranks together grow with their number."""
    for few, many in zip(starts[64], starts[256], strict=True):
        assert many["start: messages"] == few["start: messages"] > 0
        assert many["start: bytes"] <= 1.02 * few["start: bytes"]
        assert many["start: bytes of objects"] == few["start: bytes of objects"] == 0
        assert many["start: calls"] <= 1.005 * few["start: calls"]
        assert many["MB grown"] <= few["MB grown"] + 30


@pytest.mark.distributed
@pytest.mark.slow
def test_a_step_and_a_checkpoint_grow_no_faster_than_the_ranks(starts):
    for few, many in zip(starts[64], starts[256], strict=True):
        assert 0 < many["loop: bytes of objects"] <= 4.1 * few["loop: bytes of objects"]
        assert many["loop: bytes"] <= 1.02 * few["loop: bytes"]
        assert many["loop: messages"] <= few["loop: messages"]
        assert many["loop: calls"] <= 4 * few["loop: calls"]


@pytest.mark.distributed
@pytest.mark.slow
def test_every_rank_starts_with_as_many_micro_batches(starts):
    assert {line["micro-batches"] for lines in starts.values() for line in lines} == {2}
    assert [line["rank"] for line in starts[256]][::2] == [0, 255]


def on_threads(world_size: int, work) -> list:
    """`work(rank)` on every rank of a threaded process group, results by rank."""
    store = dist.HashStore()

    def rank_of_many(rank: int):
        dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size)
        try:
            return work(rank)
        finally:
            dist.destroy_process_group()

    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        with ThreadPoolExecutor(world_size) as threads:
            return list(threads.map(rank_of_many, range(world_size)))
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()


@pytest.mark.skipif(
    not hasattr(multi_threaded_pg.ThreadLocalWorld, "comms"),
    reason="this torch's threaded process group cannot be destroyed (2.11)",
)
def test_64_ranks_agree_on_what_they_gather_broadcast_and_add():
    world_size = 64
    failing = random.randrange(world_size)

    def exchange(rank: int):
        tables = distributed.all_gather_objects(
            ({f"file-{rank}": [rank, "x" * rank]}, "full" if rank == failing else None)
        )
        told = distributed.broadcast_object({"from": rank})
        return tables, told, distributed.all_reduce_sum([float(rank), 2.0**40 + rank], torch.device("cpu"))

    results = on_threads(world_size, exchange)
    tables, told, sums = results[0]
    assert all(result == results[0] for result in results)
    assert [list(table) for table, _ in tables] == [[f"file-{rank}"] for rank in range(world_size)]
    assert [failure for _, failure in tables].index("full") == failing
    assert told == {"from": 0}
    assert sums == [2016.0, 64 * 2.0**40 + 2016.0]


def test_what_rank_0_tells_every_rank_of_the_pre_flight_does_not_grow_with_them(
    tmp_path, monkeypatch, capsys
):
    """Rank 0 serves it as often as there are ranks: whatever grew with them would be served with their square."""
    world_size, port = 64, free_port()
    for name, value in (("RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_RANK", 0), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    recipe, run = load_recipe("tiny_base", [f"data.cache_dir={tmp_path / 'data'}"]), tmp_path / "run"
    own = collect(recipe, run, rank=0, local_rank=0)

    def answer_for_all_others() -> int:
        store = TCPStore("127.0.0.1", port + 1, is_master=False, wait_for_workers=False)
        for rank in range(1, world_size):
            device = own["device"] | {"right": False}
            report = own | {
                "rank": rank,
                "host": f"n{rank // 8}",
                "device": device,
                "problems": [],
                "probes": {},
            }
            store.set(f"report/{rank}", json.dumps(report))
        return len(store.get("may_begin"))

    with ThreadPoolExecutor(1) as others:
        told = others.submit(answer_for_all_others)
        assert not preflight(recipe, run)
        assert told.result() < 8
    assert " ".join(capsys.readouterr().out.split()).count("computes wrong results") == world_size - 1
