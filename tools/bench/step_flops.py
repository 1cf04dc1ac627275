"""Operations of a training step, and what a GPU can do of them: together the model FLOPs utilization (MFU).

The convention: model FLOPs (PaLM, arXiv 2204.02311, appendix B). A multiplication with an addition counts as two, a
product's backward pass as twice its forward pass (once, where the weight is frozen), recomputed activations not at all.
Attention counts each pair of a query and a key that it sees, once. Rows that are not in the batch count nothing: BICO's
dropped placeholders save work, and do not earn utilization. The peak is that of dense bf16 products, by data sheet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from bico_ds.attention.plan import AttentionPlan
from bico_ds.batch import PackedBatch
from bico_ds.model.build import TrainableModel
from bico_ds.model.weights.materialize import full_numel, full_shape

# Dense bf16 TFLOP/s by NVIDIA's data sheets, which often print twice as much, for sparse matrices. The first entry whose
# words are all in a GPU's name counts.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("GH200", 989),
    ("GB200", 2500),
    ("B200", 2250),
    ("A100", 312),
    ("A40", 149.7),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
# Of a part of a GPU, or of another variant by the same name, no data sheet's figure is at hand.
OTHER_VARIANTS = {"MIG", "LAPTOP", "D", "TI", "GRID"}
VIRTUAL = re.compile(
    r"\d+[ABCQ]"
)  # the profile of a virtual GPU: gigabytes and kind, as in "NVIDIA L40S-12Q"


def peak_tflops(gpu: str) -> float | None:
    """The peak of a GPU by its `torch.cuda.get_device_name`, in TFLOP/s; None where it is not in the table."""
    words = set(re.split(r"[ -]", gpu.upper()))
    if words & OTHER_VARIANTS or any(map(VIRTUAL.fullmatch, words)):
        return None
    return next((peak for name, peak in PEAK_TFLOPS if words.issuperset(name.upper().split())), None)


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations of a model's training step: per row of the batch, per target, and per visible pair of one head's rows."""

    per_row: float
    per_target: float
    per_pair: float

    @classmethod
    def of(cls, model: TrainableModel) -> ModelFlops:
        """Of the weights that this model trains and of those that are frozen, partitioned or not.

        A frozen matrix counts a backward pass for its input even in the first layer of a model whose embeddings are frozen.
        """
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        matrices = [
            parameter
            for name, parameter in model.named_parameters()
            if ".layers." in name and len(full_shape(parameter)) == 2
        ]
        head = model.causal_lm.lm_head.weight
        return cls(
            per_row=float(sum(_per_row(matrix) for matrix in matrices)),
            per_target=float(_per_row(head)),
            per_pair=12.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        )

    def of_step(self, batch: PackedBatch) -> float:
        """Operations of one optimizer step on this micro-batch, forward and backward."""
        return (
            self.per_row * len(batch.input_ids)
            + self.per_target * len(batch.targets)
            + self.per_pair * visible_pairs(batch.plan)
        )

    def head_share(self, batch: PackedBatch) -> float:
        """The share of the head's product in `of_step`."""
        return self.per_target * len(batch.targets) / self.of_step(batch)


def _per_row(matrix: torch.Tensor) -> int:
    return (6 if matrix.requires_grad else 4) * full_numel(matrix)


def visible_pairs(plan: AttentionPlan) -> int:
    """Pairs of a query and a key that it sees."""
    kept = plan.cu_seqlens.diff().long()
    if plan.mode == "causal":
        return int((kept * (kept + 1) // 2).sum())
    live = torch.bincount(plan.live_document, minlength=len(kept))
    return int((kept * (kept + live)).sum())
