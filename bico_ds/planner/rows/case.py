"""A model as it is trained: what decides which tensors its rows need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.planner.architecture import Architecture, Linear
from bico_ds.planner.deployment import ELEMENT_BYTES

FP32 = 4  # bytes

Attention = Literal["fused", "flash", "triton", "tiles"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`shapes` trained with elements of `size` bytes.

    `on_cuda`: there Triton and liger-kernel are taken to be installed; elsewhere the CPU kernels of `bico_ds/native`.
    `attention`: the fused CPU kernel, the passes of a flash kernel, the Triton kernels, or dense tiles alone, where no flash
    kernel takes fp32. `tiles_live`: beside the flash kernel tiles serve the live rows, and not the Triton kernels. `zero3`:
    DeepSpeed's stage 3 has put its function in the place of `torch.nn.functional.linear` (`LinearFunctionForZeroStage3` of
    its runtime/zero/linear.py), which keeps the input, after the product, though the weight be frozen.
    """

    shapes: Architecture
    lora: LoraSpec | None
    size: int
    on_cuda: bool
    attention: Attention
    tiles_live: bool
    zero3: bool

    @property
    def query_width(self) -> int:
        """Elements of all query heads of a row."""
        return self.shapes.heads * self.shapes.head_dim

    @property
    def key_width(self) -> int:
        return self.shapes.key_heads * self.shapes.head_dim

    @property
    def drops(self) -> bool:
        """Whether adapters see their inputs through dropout."""
        return self.lora is not None and self.lora.dropout > 0

    def is_adapted(self, name: str) -> bool:
        return self.lora is not None and name in self.lora.targets

    def linear(self, name: str) -> Linear:
        return next(linear for linear in self.shapes.linears if linear.name == name)


def case_of(shapes: Architecture, model: ModelSpec, *, on_cuda: bool, zero3: bool) -> Case:
    """As `bico_ds.attention.backends.resolve` and `bico_ds.model.elementwise` choose; the oracle is planned as "auto"."""
    size = ELEMENT_BYTES[model.dtype]
    attention: Attention = "fused"
    if on_cuda:
        attention = "tiles" if size == FP32 else "triton" if model.attention_backend == "triton" else "flash"
    return Case(
        shapes=shapes,
        lora=model.lora,
        size=size,
        on_cuda=on_cuda,
        attention=attention,
        tiles_live=attention == "flash" and model.attention_backend not in ("auto", "oracle"),
        zero3=zero3,
    )
