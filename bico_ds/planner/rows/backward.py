"""The backward pass from the head through the last decoder layer, replayed for its memory.

Tensors are made and freed in autograd's order. Gradients of weights are not among them.
"""

from __future__ import annotations

from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.attention import GRADIENTS, LargestTile, attention_backward
from bico_ds.planner.rows.case import Case
from bico_ds.planner.workload import MicroBatch

_PRODUCT = "gradient of the gated product"
_NORMED = "gradient of the second norm's output"


def head_backward(alive: Alive, case: Case, batch: MicroBatch) -> None:
    """To the last layer's output: `index_select` and the last norm of `TrainableModel` (bico_ds/model/build.py)."""
    row = case.size * case.shapes.hidden
    alive.make({"gradient of rows with a loss": row}, rows=batch.head_rows)
    alive.make({"zeros": row, "gradient of the last norm's output": row})
    alive.free("zeros", "gradient of rows with a loss")
    _norm(
        alive,
        case,
        "last norm",
        case.shapes.hidden,
        "gradient of the last norm's output",
        "gradient of the layer",
    )


def layer_backward(alive: Alive, case: Case, batch: MicroBatch, tile: LargestTile) -> None:
    """Of `_PackedLayer` (bico_ds/model/swap.py): the gated MLP with its norm, then attention with its own.

    From "gradient of the layer", of its output, to that of its input, which is the next layer's.
    """
    E = case.shapes.hidden
    _linear(alive, case, "down_proj", None, _PRODUCT, read_last="gated product")
    _gates(alive, case)
    _norm(alive, case, "second norm", E, _NORMED, "gradient of the sum")
    alive.free("gradient of the layer")
    _linear(alive, case, "o_proj", None, "gradient of attention's output")
    attention_backward(alive, case, batch, tile)
    if case.shapes.qk_norms:
        _norm(alive, case, "query norm", case.query_width, GRADIENTS[0], "gradient of q_proj")
        _norm(alive, case, "key norm", case.key_width, GRADIENTS[1], "gradient of k_proj")
    for name, grad in zip(("v_proj", "k_proj", "q_proj"), reversed(GRADIENTS), strict=True):
        _linear(alive, case, name, grad, f"gradient by {name}")
    alive.free("gradient by k_proj", "gradient by v_proj", "output of the first norm")
    _norm(alive, case, "first norm", E, "gradient by q_proj", "gradient of the layer")


def _norm(alive: Alive, case: Case, name: str, width: int, of_output: str, of_input: str) -> None:
    """Of an RMSNorm, with the gradient that its sum has by itself."""
    alive.make({of_input: case.size * width})
    alive.free(of_output, f"input of the {name}", f"inverse root of the {name}")


def _linear(
    alive: Alive, case: Case, name: str, of_output: str | None, of_input: str, *, read_last: str | None = None
) -> None:
    """Of a linear layer, and of its adapter if it has one: the gradients of the input by both, and their sum.

    `read_last`: its input, where no other layer is still to read it.
    """
    linear = case.linear(name)
    row = case.size * linear.inputs
    if case.lora is not None and case.is_adapted(name):
        alive.make({"scaled gradient": case.size * linear.outputs})
        alive.make({"gradient of the low rank": case.size * case.lora.rank})
        alive.free("scaled gradient", f"low rank of {name}")
        alive.make({"gradient by the adapter": row})
        alive.free("gradient of the low rank", f"dropped input of {name}")
        if case.drops:
            alive.make({"gradient before dropout": row})
            alive.free("gradient by the adapter", f"dropout mask of {name}")
        alive.make({"gradient by the weight": row})
        alive.free(*([read_last] if read_last else []))
        alive.make({of_input: row})
        alive.free("gradient before dropout", "gradient by the adapter", "gradient by the weight")
    else:
        alive.make({of_input: row})
    alive.free(*(name for name in (of_output, read_last) if name is not None))


def _gates(alive: Alive, case: Case) -> None:
    """From the gated product's gradient to that of the second norm's output."""
    row = case.size * case.shapes.intermediate
    if case.on_cuda:  # liger-kernel writes over both
        alive.free("gate", "up")
    alive.make({"gradient of gate": row, "gradient of up": row})
    alive.free(_PRODUCT, "gate", "up")
    _linear(alive, case, "up_proj", "gradient of up", f"{_NORMED} by up")
    _linear(alive, case, "gate_proj", "gradient of gate", _NORMED, read_last="output of the second norm")
    alive.free(f"{_NORMED} by up")
