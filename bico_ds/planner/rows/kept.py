"""The tensors that autograd keeps of a decoder layer, each with its bytes per row and with who keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bico_ds.planner.rows.case import FP32, Case

# By linear layer, the name of its input.
_INPUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "output of the first norm"),
    "o_proj": "output of attention",
    **dict.fromkeys(("gate_proj", "up_proj"), "output of the second norm"),
    "down_proj": "gated product",
}
_LINEAR = "torch.nn.functional.linear"
_ATTENTION = "_PackedAttention of bico_ds/attention/packed.py"
_NORM = "_RMSNorm and _AddRMSNorm of bico_ds/model/elementwise.py"
_GATES = "_SwiGLU of bico_ds/model/elementwise.py"
_ADAPTER = "Linear.forward of peft/tuners/lora/layer.py"


@dataclass(frozen=True, kw_only=True)
class KeptTensor:
    """Bytes per row from the forward pass on, and `source`: the function that keeps it."""

    name: str
    bytes: float
    source: str


def layer_tensors(case: Case, *, is_first: bool = False) -> tuple[KeptTensor, ...]:
    """Of a decoder layer, in the order of its forward pass (`_PackedLayer` of bico_ds/model/swap.py).

    `is_first`: the input of the first layer needs no gradient where the embedding is frozen, and so its norm keeps nothing.
    """
    return tuple(_layer_tensors(case, frozen=is_first and case.lora is not None))


def _layer_tensors(case: Case, *, frozen: bool) -> Iterator[KeptTensor]:
    shapes, b = case.shapes, case.size
    if not frozen:
        yield from norm_tensors(case, "first norm", shapes.hidden)
    yield from _input(case, "q_proj", "k_proj", "v_proj", frozen=frozen)
    if shapes.qk_norms:
        yield from norm_tensors(case, "query norm", case.query_width, heads=shapes.heads)
        yield from norm_tensors(case, "key norm", case.key_width, heads=shapes.key_heads)
    yield KeptTensor(name="queries", bytes=b * case.query_width, source=_ATTENTION)
    yield KeptTensor(name="keys", bytes=b * case.key_width, source=_ATTENTION)
    yield KeptTensor(name="values", bytes=b * case.key_width, source=_ATTENTION)
    yield KeptTensor(name="output of attention", bytes=b * case.query_width, source=_ATTENTION)
    yield KeptTensor(name="log-sum-exp", bytes=FP32 * shapes.heads, source=_ATTENTION)
    yield from _adapter(case, "o_proj")
    yield from norm_tensors(case, "second norm", shapes.hidden)
    yield from _input(case, "gate_proj", "up_proj")
    yield KeptTensor(name="gate", bytes=b * shapes.intermediate, source=_GATES)
    yield KeptTensor(name="up", bytes=b * shapes.intermediate, source=_GATES)
    yield from _input(case, "down_proj")


def norm_tensors(case: Case, name: str, width: int, *, heads: int = 1) -> tuple[KeptTensor, ...]:
    """Of an RMSNorm over `width` elements per row, in `heads` parts."""
    return (
        KeptTensor(name=f"input of the {name}", bytes=case.size * width, source=_NORM),
        KeptTensor(name=f"inverse root of the {name}", bytes=FP32 * heads, source=_NORM),
    )


def _input(case: Case, *names: str, frozen: bool = False) -> Iterator[KeptTensor]:
    """The input that these linear layers share, where one of them keeps it, and what their adapters keep.

    `frozen`: the input needs no gradient.
    """
    adapted = any(case.is_adapted(name) for name in names) and not case.drops
    if case.lora is None or adapted or (case.zero3 and not frozen):
        yield KeptTensor(
            name=_INPUT[names[0]], bytes=case.size * case.linear(names[0]).inputs, source=_LINEAR
        )
    for name in names:
        yield from _adapter(case, name, frozen=frozen)


def _adapter(case: Case, name: str, *, frozen: bool = False) -> Iterator[KeptTensor]:
    """Of an adapter; torch's dropout keeps its mask in the dtype of its input on a CPU, in one byte per element on CUDA."""
    if case.lora is None or not case.is_adapted(name):
        return
    width = case.linear(name).inputs
    if case.drops:
        mask = 1 if case.on_cuda else case.size
        if not frozen:
            yield KeptTensor(name=f"dropout mask of {name}", bytes=mask * width, source=_ADAPTER)
        yield KeptTensor(name=f"dropped input of {name}", bytes=case.size * width, source=_ADAPTER)
    yield KeptTensor(name=f"low rank of {name}", bytes=case.size * case.lora.rank, source=_ADAPTER)
