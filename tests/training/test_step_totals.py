"""What ranks tell each other of a step, on torch's threaded process group."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed import multi_threaded_pg

from bico_ds.batch import ComparedRows, PackedBatch
from bico_ds.model.head import Losses
from bico_ds.runtime.distributed import Ranks
from bico_ds.training.step_totals import StepTotals, add_up, agree
from tests.distributed.model_ranks import causal_batch
from tests.distributed.test_many_ranks import on_threads

pytestmark = pytest.mark.skipif(
    not hasattr(multi_threaded_pg.ThreadLocalWorld, "comms"),
    reason="this torch's threaded process group cannot be destroyed (2.11)",
)

WORLD_SIZE, MICRO_BATCHES, SOURCES = 3, 2, 4


def run_of(rank: int, *, stop: bool = False) -> Any:
    ranks = Ranks(rank=rank, local_rank=rank, world_size=WORLD_SIZE, device=torch.device("cpu"))
    return SimpleNamespace(ranks=ranks, stop=stop)


def drawn_batches(seed: int) -> list[PackedBatch]:
    """Micro-batches of 13 rows and up to 12 targets; the sources of their targets, and how many of them are compared."""
    draw = np.random.default_rng(seed)
    found = []
    for number, targets in enumerate(draw.integers(1, 13, MICRO_BATCHES).tolist()):
        batch = causal_batch(seed * MICRO_BATCHES + number, [9, 4], targets)
        sources = torch.from_numpy(draw.integers(0, SOURCES, targets))
        compared = ComparedRows(index=torch.arange(draw.integers(0, targets + 1)))
        found.append(replace(batch, target_sources=sources, compared=compared))
    return found


def weighted(batches: list[PackedBatch]) -> list[PackedBatch]:
    """With weights for all batches but the first."""
    rest = [replace(batch, loss_weights=0.1 + torch.rand(len(batch.targets))) for batch in batches[1:]]
    return [*batches[:1], *rest]


def weights_of(batch: PackedBatch) -> np.ndarray:
    weights = batch.loss_weights
    return np.ones(len(batch.targets)) if weights is None else weights.double().numpy()


def drawn_losses(batches: list[PackedBatch], seed: int) -> list[Losses]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(len(batch.targets), generator=generator) for batch in batches]
    return [Losses(loss=r.sum(), divergence=torch.rand((), generator=generator), row_losses=r) for r in rows]


def test_every_rank_learns_the_sums_of_all_the_first_one_s_norm_and_the_next_step() -> None:
    seed = random.randrange(10_000)
    batches = [weighted(drawn_batches(seed + rank)) for rank in range(WORLD_SIZE)]
    found = [drawn_losses(own, seed + rank) for rank, own in enumerate(batches)]
    following = [weighted(drawn_batches(seed + WORLD_SIZE + rank)) for rank in range(WORLD_SIZE)]
    norm = torch.rand((), dtype=torch.float32)

    def added(rank: int) -> StepTotals:
        return add_up(
            batches[rank],
            found[rank],
            run_of(rank, stop=rank == seed % WORLD_SIZE),
            sources=SOURCES,
            wait_seconds=float(rank),
            norm_before=norm + rank,
            following=SimpleNamespace(batches=following[rank]),  # type: ignore[arg-type]
        )

    totals = on_threads(WORLD_SIZE, added)
    losses = [part for own in found for part in own]
    sources = torch.cat([batch.target_sources for own in batches for batch in own])  # type: ignore[misc]
    weights = np.concatenate([weights_of(batch) for own in batches for batch in own])
    rows = torch.cat([part.row_losses for part in losses]).double().numpy() * weights
    for total in totals:
        assert total.loss == pytest.approx(sum(float(part.loss) for part in losses), rel=1e-12)
        assert total.divergence == pytest.approx(sum(float(part.divergence) for part in losses), rel=1e-12)
        assert total.source_losses == pytest.approx(np.bincount(sources, rows, SOURCES).tolist(), rel=1e-12)
        assert total.source_weights == pytest.approx(
            np.bincount(sources, weights, SOURCES).tolist(), rel=1e-12
        )
        assert (total.rows, total.represented) == (WORLD_SIZE * MICRO_BATCHES * 13,) * 2
        assert total.pairs == WORLD_SIZE * MICRO_BATCHES * (9 * 10 + 4 * 5) // 2
        assert total.wait_seconds == sum(range(WORLD_SIZE))
        assert total.norm_before == float(norm), "to the last bit"
        assert total.following is not None and total.following.stop
        expected = [batch for own in following for batch in own]
        assert total.following.counts.targets == sum(len(batch.targets) for batch in expected)
        weight = sum(weights_of(batch).sum() for batch in expected)
        assert total.following.counts.weight == pytest.approx(weight, rel=1e-12)
        compared = [batch.compared for batch in expected if batch.compared is not None]
        assert total.following.counts.compared == sum(len(rows.index) for rows in compared)


def test_a_step_without_targets_adds_up_to_nothing_and_a_pause_has_no_next_step() -> None:
    nothing: dict[str, Any] = {
        "sources": SOURCES,
        "wait_seconds": 0.5,
        "norm_before": None,
        "following": None,
    }
    for total in on_threads(WORLD_SIZE, lambda rank: add_up([], [], run_of(rank), **nothing)):
        assert (total.loss, total.divergence, total.rows, total.pairs, total.wait_seconds) == (
            0,
            0,
            0,
            0,
            1.5,
        )
        assert np.isnan(total.norm_before) and total.following is None
        assert not [*total.source_losses, *total.source_weights]


def test_a_stop_of_any_rank_is_a_stop_of_all() -> None:
    batches = drawn_batches(random.randrange(10_000))
    step: Any = SimpleNamespace(batches=batches)
    for asked in (None, *range(WORLD_SIZE)):
        agreed = on_threads(
            WORLD_SIZE, lambda rank, asked=asked: agree(step, run_of(rank, stop=rank == asked))
        )
        assert {one.stop for one in agreed} == {asked is not None}
        assert {one.counts.targets for one in agreed} == {WORLD_SIZE * sum(len(b.targets) for b in batches)}
        assert {one.counts.weight for one in agreed} == {one.counts.targets for one in agreed}
