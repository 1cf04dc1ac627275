"""What ranks tell each other of a step: one vector, summed over all of them, and the one reading of the device in a step.

It holds what the step gave, the gradient norm of the step before, and what must be known of the following step before its
first forward pass. A step that none prepares, the first one or one after a pause, needs a vector of its own (`agree`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice

import torch

from bico_ds.batch import PackedBatch, total_weight
from bico_ds.data.loading.loader import RankStep
from bico_ds.model.head import Losses
from bico_ds.runtime.distributed import all_reduce_sum
from bico_ds.runtime.peak_memory import MemoryUse
from bico_ds.training.run import Run


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Of the whole global batch: its targets, the sum of their weights, and the rows compared with the start model."""

    targets: int
    weight: float
    compared: int


@dataclass(frozen=True, kw_only=True)
class AgreedStep:
    """A step that has not begun: this rank's share, and what all ranks know. `stop`: one was asked to stop before it."""

    rank_step: RankStep
    counts: StepCounts
    stop: bool


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Of a step, over all ranks: sums of losses and divergences (nats), rows, original tokens, pairs, seconds of waiting.

    Losses are weighted. `source_losses` and `source_weights`: the sum of each data source's, and of their weights, where
    there are several. `norm_before`: the gradient norm of the step before, NaN where it was not given. `following`: the
    next step, where it was given. `own_seconds`: by rank, where it was given. `memory`: of each number of `MemoryUse`, in
    bytes, the largest of any rank; where it was given.
    """

    loss: float
    divergence: float
    rows: int
    represented: int
    pairs: int
    wait_seconds: float
    source_losses: Sequence[float]
    source_weights: Sequence[float]
    norm_before: float
    following: AgreedStep | None
    own_seconds: Sequence[float] = ()
    memory: dict[str, int] = field(default_factory=dict)


def agree(rank_step: RankStep, run: Run) -> AgreedStep:
    """Make a step known by itself. Collective; waits for the device."""
    return _agreed(rank_step, all_reduce_sum(_votes(rank_step, run), run.ranks.device))


def add_up(
    batches: Sequence[PackedBatch],
    found: Sequence[Losses],
    run: Run,
    *,
    sources: int,
    wait_seconds: float,
    norm_before: torch.Tensor | None,
    following: RankStep | None,
    own_seconds: float | None = None,
    memory: MemoryUse | None = None,
) -> StepTotals:
    """Add up a step of these micro-batches, of which the model found `found`. Collective; waits for the device, once.

    `sources`: how many data sources there are; `norm_before`: a scalar, on the device or the host, the first rank's counts;
    `own_seconds`: what this rank worked and did not wait, and `memory`: what it has; on all ranks or none.
    """
    device, work = run.ranks.device, _work(batches)
    norm = torch.tensor(math.nan) if norm_before is None else norm_before
    norm = norm.to(device, non_blocking=True).double().reshape(1)
    norm = norm if run.ranks.is_first else torch.zeros_like(norm)
    on_device = torch.cat([norm, _sums(batches, found, sources, device)])
    votes = [] if following is None else _votes(following, run)
    own = _in_own_slot([] if own_seconds is None else [own_seconds], run)
    used = _in_own_slot([] if memory is None else list(asdict(memory).values()), run)
    numbers = iter(all_reduce_sum([*votes, *work, wait_seconds, *own, *used], device, on_device))
    # In the order of the votes, the work, the seconds, the memory, and what is on the device.
    votes = list(islice(numbers, len(votes)))
    rows, represented, pairs = map(int, islice(numbers, len(work)))
    return StepTotals(
        following=None if following is None else _agreed(following, votes),
        rows=rows,
        represented=represented,
        pairs=pairs,
        wait_seconds=next(numbers),
        own_seconds=list(islice(numbers, len(own))),
        memory=_largest(list(islice(numbers, len(used)))),
        norm_before=next(numbers),
        loss=next(numbers),
        divergence=next(numbers),
        source_losses=list(islice(numbers, sources)),
        source_weights=list(numbers),
    )


def _in_own_slot(numbers: list[float], run: Run) -> list[float]:
    """A slot for the numbers of each rank, of which this one fills its own: the sums are all ranks' numbers."""
    rank, others = run.ranks.rank, [0.0] * len(numbers)
    return others * rank + numbers + others * (run.ranks.world_size - rank - 1)


def _largest(numbers: list[float]) -> dict[str, int]:
    """Of all ranks' numbers of `MemoryUse`, the largest of each."""
    if not numbers:
        return {}
    names = [part.name for part in fields(MemoryUse)]
    return {name: int(max(numbers[place :: len(names)])) for place, name in enumerate(names)}


def _votes(rank_step: RankStep, run: Run) -> list[float]:
    """What this rank tells of a step: its targets, their weight, its compared rows, and whether it was asked to stop."""
    targets = sum(len(batch.targets) for batch in rank_step.batches)
    compared = sum(len(batch.compared.index) for batch in rank_step.batches if batch.compared is not None)
    weight = sum(map(total_weight, rank_step.batches))
    return [targets, weight, compared, float(bool(run.stop))]


def _agreed(rank_step: RankStep, votes: Sequence[float]) -> AgreedStep:
    """`votes`: the sums of those of all ranks."""
    targets, weight, compared, stops = votes
    counts = StepCounts(targets=int(targets), weight=weight, compared=int(compared))
    return AgreedStep(rank_step=rank_step, counts=counts, stop=stops > 0)


def _work(batches: Sequence[PackedBatch]) -> list[int]:
    """Rows, the original tokens that they represent, and the pairs that attention sees."""
    return [
        sum(len(batch.input_ids) for batch in batches),
        sum(batch.represented_tokens for batch in batches),
        sum(batch.plan.num_pairs for batch in batches),
    ]


def _sums(
    batches: Sequence[PackedBatch], found: Sequence[Losses], sources: int, device: torch.device
) -> torch.Tensor:
    """Loss and divergence; of several sources each one's loss, then each one's weight: fp64, on the device."""
    if not found:
        return torch.zeros(2, dtype=torch.float64, device=device)
    sums = torch.stack([torch.stack((part.loss, part.divergence)) for part in found]).double().sum(0)
    if sources == 1:
        return sums
    numbers = torch.cat([batch.target_sources for batch in batches if batch.target_sources is not None])
    losses = torch.cat([part.row_losses for part in found]).double()
    weights = torch.cat([_row_weights(*pair) for pair in zip(batches, found, strict=True)])
    # Counted by additions, because `bincount` would wait for the device.
    counted = torch.stack((losses * weights, weights))
    by_source = sums.new_zeros(2, sources).index_add_(1, numbers.to(device, non_blocking=True), counted)
    return torch.cat([sums, by_source.flatten()])


def _row_weights(batch: PackedBatch, found: Losses) -> torch.Tensor:
    """The weight of each target's loss: fp64 [N], on the device."""
    if batch.loss_weights is None:
        return torch.ones_like(found.row_losses, dtype=torch.float64)
    return batch.loss_weights.to(found.row_losses.device, non_blocking=True).double()
