"""The loader on real processes: two ranks see what one sees alone, and one goes on where two stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from bico_ds.common.process_end import end_process
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.data import DataSpec, SourceSpec
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.store import StoreHeader, TokenStore
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.runtime.launch_environment import free_port

pytestmark = pytest.mark.distributed
STOP, END, GLOBAL = 7, 16, 4


def make_loader(store: Path, *, rank: int, world_size: int, micro: int, state=None) -> ElasticLoader:
    specs = [NtpSpec(probability=0.5), BicoSpec(probability=0.5)]
    tokens = TokenRoles(special_ids=(), placeholder_id=0, vocabulary=60_000)
    stream = StreamSpec(
        stores=[TokenStore.open(store)],
        data=DataSpec(sources=[SourceSpec(store=str(store))], capacity=128, workers=1),
        schedule=ObjectiveSchedule(build_objectives(specs, tokens), [0.5, 0.5], seed=3),
        seed=3,
        global_batch_bins=GLOBAL,
        vocabulary=tokens.vocabulary,
    )
    share = RankShare(rank=rank, world_size=world_size, micro_batch_bins=micro)
    return ElasticLoader(stream, share, state=state)


def seen_in(loader: ElasticLoader, step: int) -> list[str]:
    """Each document of this rank's share, with the sum of what is visible and what is predicted of it."""
    items = []
    for batch in loader.step(step).batches:
        cu, live = batch.plan.cu_seqlens.tolist(), batch.plan.live_document.tolist()
        owner = np.repeat(np.arange(len(cu) - 1), np.diff(cu)).tolist() + live
        documents = [[name, [], []] for name in batch.documents.tolist()]
        rows = list(zip(owner, batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True))
        for document, token, position in rows:
            documents[document][1].append((position, token))
        for row, target in zip(batch.loss_rows.tolist(), batch.targets.tolist(), strict=True):
            documents[owner[row]][2].append((rows[row][2], target))
        items += [json.dumps([name, visible, sorted(wanted)]) for name, visible, wanted in documents]
    return items


def work(rank: int, port: int, store: Path, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        state = None
        for begin, end, micro in ((0, STOP, 2), (STOP, END, 1)):
            loader = make_loader(store, rank=rank, world_size=2, micro=micro, state=state)
            consumed = loader.start_consumed
            for step in range(begin, end):
                consumed = consumed.plus(loader.step(step).counts)
                gathered: list = [None, None]
                dist.all_gather_object(gathered, seen_in(loader, step))
                if rank == 0:
                    (folder / f"{step}.json").write_text(json.dumps(gathered[0] + gathered[1]))
            states: list = [None, None]
            dist.all_gather_object(states, loader.state_dict(end, consumed))
            assert states[0] == states[1]
            state = json.loads(json.dumps(states[0]))
            loader.close()
        (folder / f"state{rank}.json").write_text(json.dumps(state))
    finally:
        dist.destroy_process_group()
    end_process(0)


def test_two_real_ranks_see_the_stream_of_one_and_one_goes_on_for_two(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 120, 60)
    header = StoreHeader(
        vocab_size=60_000,
        tokenizer_hash="test",
        special_ids=(),
        bos_id=None,
        eos_id=2,
        add_bos=False,
        add_eos=False,
    )
    with TokenStoreWriter(tmp_path / "store", header) as writer:
        zeros = np.zeros(len(lengths), dtype=np.int64)
        words = np.ones(lengths.sum(), dtype=bool)
        writer.append(
            np.arange(lengths.sum()), lengths, prompt_lengths=zeros, groups=zeros, word_starts=words
        )
        writer.finish()
    port = free_port()
    mp.spawn(work, args=(port, tmp_path / "store", tmp_path), nprocs=2)

    alone = make_loader(tmp_path / "store", rank=0, world_size=1, micro=1)
    for step in range(END):
        assert Counter(json.loads((tmp_path / f"{step}.json").read_text())) == Counter(seen_in(alone, step))
    assert alone.total_steps(1) < END
    state = json.loads((tmp_path / "state1.json").read_text())
    resumed = make_loader(tmp_path / "store", rank=0, world_size=1, micro=4, state=state)
    assert Counter(seen_in(resumed, END)) == Counter(seen_in(alone, END))
    for loader in (alone, resumed):
        loader.close()
