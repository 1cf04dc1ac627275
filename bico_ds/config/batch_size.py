"""How the global batch divides over ranks."""

from __future__ import annotations

from bico_ds.common.errors import UserError


def micro_batches_per_rank(global_batch_bins: int, micro_batch_bins: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step: DeepSpeed's gradient accumulation steps.

    Raises `UserError` where the global batch is no multiple of micro-batch times ranks, naming the nearest that are.
    """
    together = micro_batch_bins * world_size
    if global_batch_bins % together:
        below = global_batch_bins // together * together
        nearest = " or ".join(str(n) for n in (below, below + together) if n)
        raise UserError(
            f"training.global_batch_bins ({global_batch_bins}) must be a multiple of training.micro_batch_bins "
            f"({micro_batch_bins}) x ranks ({world_size}) = {together}: choose {nearest}, or another number of ranks"
        )
    return global_batch_bins // together
