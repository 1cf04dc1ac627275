"""Operations of a step, and the bytes of its elementwise part."""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.schema import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.workload import MicroBatch


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations, a multiplication with an addition as two, of one micro-batch forward and backward.

    `useful`: the convention of MFU (PaLM, arXiv 2204.02311, appendix B), without recomputation, visible pairs only.
    `products` and `attention`: what is executed, recomputation among it.
    """

    useful: float
    products: float
    attention: float

    @property
    def executed(self) -> float:
        return self.products + self.attention


def step_flops(architecture: Architecture, model: ModelSpec, batch: MicroBatch) -> StepFlops:
    """STUB"""
    useful = 6 * architecture.parameters * batch.rows
    return StepFlops(useful=useful, products=useful, attention=0)


def elementwise_bytes(architecture: Architecture, model: ModelSpec, batch: MicroBatch) -> float:
    """STUB: bytes that norms, gates, rotations, additions, the loss and the like read and write, forward and backward."""
    return 0.0
