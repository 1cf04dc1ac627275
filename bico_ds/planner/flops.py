"""Operations of a training step: the useful ones that MFU counts, and all that are executed.

A multiplication with an addition counts as two. What is executed follows the code of this repository and autograd's rules;
`tests/planner/test_flops.py` compares it with torch's own count of real steps. All other work counts in bytes, since
memory bounds it: `planner/compute/elementwise.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS, ModelSpec
from bico_ds.planner.architecture import Architecture, Linear
from bico_ds.planner.compute.attention import Visits, expected_visits, part_of
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.workload import MicroBatch


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations, a multiplication with an addition as two, of one micro-batch forward and backward.

    `useful`: the convention of MFU (PaLM, arXiv 2204.02311, appendix B), without recomputation, visible pairs only.
    `linear`, `head` and `of_attention`, by the part of a step in which its kernels run: what is executed, recomputation
    among it.
    """

    useful: float
    linear: float
    head: float
    of_attention: Mapping[StepPart, float]

    @property
    def products(self) -> float:
        return self.linear + self.head

    @property
    def attention(self) -> float:
        return sum(self.of_attention.values())

    @property
    def executed(self) -> float:
        return self.products + self.attention

    def times(self, factor: float) -> StepFlops:
        """Of so many micro-batches."""
        return StepFlops(
            useful=factor * self.useful,
            linear=factor * self.linear,
            head=factor * self.head,
            of_attention={part: factor * flops for part, flops in self.of_attention.items()},
        )


def step_flops(
    architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool = True
) -> StepFlops:
    """Operations of an average micro-batch, forward and backward.

    `on_cuda`: whether it runs on a GPU, or on a CPU that has the fused kernel; it decides what `attention_backend: auto` is.
    """
    compared = comparison_flops(architecture, model, batch)
    once = base_flops(architecture, batch)
    of_attention: dict[StepPart, float] = defaultdict(float)
    expected = expected_visits(model, batch, on_cuda=on_cuda)
    kernels = [visits.kernel for visits in expected]
    for visits in expected:
        of_attention[part_of(visits.kernel, kernels, on_cuda=on_cuda)] += attention_flops(
            architecture, model, [visits], repeats_base=batch.repeats_base
        )
    return StepFlops(
        useful=useful_flops(architecture, model, rows=batch.rows, targets=batch.head_rows, pairs=batch.pairs),
        linear=linear_flops(architecture, model, batch.rows) + once,
        head=head_flops(architecture, model, batch.head_rows) + compared - once,
        of_attention=dict(of_attention),
    )


def useful_flops(
    architecture: Architecture, model: ModelSpec, *, rows: float, targets: float, pairs: float
) -> float:
    """The operations that count for MFU, of a micro-batch or of any number of them.

    `rows` through the model, `targets` with a loss, `pairs` of a query and a key that it sees, per head and layer.

    PaLM (arXiv 2204.02311, appendix B): 2 per element of a matrix and row forward and 4 backward, of which 2 where the
    matrix is frozen (LoRA: 4 per element of the base, 6 of an adapter); the head alike, per target. Attention: 12 per
    layer, head, dimension and pair, for two products forward and four backward. The embedding is a table and costs
    nothing, nor does recomputation, nor what is not in the batch. A frozen matrix counts the gradient of its input even in
    the first layer of a model whose embeddings are frozen.
    """
    per_element = 6 if model.lora is None else 4
    per_row = per_element * architecture.layers * architecture.layer_matrix_elements
    if model.lora is not None:
        per_row += 6 * architecture.adapter_parameters(model.lora)
    per_target = per_element * architecture.embedding_parameters
    per_pair = 12 * architecture.layers * architecture.heads * architecture.head_dim
    return float(per_row * rows + per_target * targets + per_pair * pairs)


def recomputed_layers(architecture: Architecture, model: ModelSpec) -> int:
    """Decoder layers whose forward pass runs again in the backward pass: every k-th, from the first (model/build.py)."""
    every = model.activation_checkpointing
    return -(-architecture.layers // every) if every else 0


def linear_flops(architecture: Architecture, model: ModelSpec, rows: float) -> float:
    """Executed in the linear layers of the decoder, for `rows` through the model: forward, backward and recomputation.

    Two operations per element, row and product (arXiv 2205.05198, appendix A): one product forward, and backward one for
    each gradient that autograd computes, of the input and of the weight. A recomputed layer stops before its last product,
    whose result nobody needs (the early stop of `torch.utils.checkpoint`).
    """
    first = _layer_products(architecture, model, is_first=True)
    other = _layer_products(architecture, model, is_first=False)
    matrices = [elements for linear in architecture.linears for elements in _matrices(linear, model)]
    recomputed = recomputed_layers(architecture, model) * sum(matrices[:-1])
    return 2.0 * rows * (first + (architecture.layers - 1) * other + recomputed)


# The linear layers of a decoder layer, in order: those of one group read the same rows.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _layer_products(architecture: Architecture, model: ModelSpec, *, is_first: bool) -> int:
    """Elements of the matrices of a decoder layer, each as often as it is multiplied, forward and backward.

    With LoRA the base has no gradient, and neither has what enters the first layer: there autograd computes none for the
    inputs of linear layers that no adapted one comes before.
    """
    by_name = {linear.name: _matrices(linear, model) for linear in architecture.linears}
    products, input_has_gradient = 0, model.lora is None or not is_first
    for group in _GROUPS:
        for base, *adapter in map(by_name.__getitem__, group):
            forward, trained = base + sum(adapter), base if model.lora is None else sum(adapter)
            # B's input is A's result, which always has a gradient.
            inputs = forward if input_has_gradient else sum(adapter[1:])
            products += forward + trained + inputs
        input_has_gradient = input_has_gradient or any(len(by_name[name]) > 1 for name in group)
    return products


def _matrices(linear: Linear, model: ModelSpec) -> list[int]:
    """Elements of the matrices that a linear layer multiplies by, in order: its own, then adapters A and B."""
    if model.lora is None or linear.name not in model.lora.targets:
        return [linear.weight_elements]
    return [linear.weight_elements, model.lora.rank * linear.inputs, model.lora.rank * linear.outputs]


def head_flops(architecture: Architecture, model: ModelSpec, targets: float) -> float:
    """Executed in the head, for `targets` rows that have a loss (bico_ds/model/head.py).

    Logits and the gradient of the rows; where the head is trained its weight's gradient, for which a bf16 head computes the
    logits again if there are more than `LOW_PRECISION_CHUNKS` chunks (`_fill_by_vocabulary`). Checkpointing repeats none.
    """
    products = 2 if model.lora is not None else 4 if head_repeats_logits(model, targets) else 3
    return 2.0 * products * architecture.embedding_parameters * targets


def comparison_flops(architecture: Architecture, model: ModelSpec, batch: MicroBatch) -> float:
    """Executed for the divergence from the start model, but for attention (bico_ds/model/divergence.py).

    In the head three products per compared row: its logits and their gradient's, and the start model's logits, or of a
    trained head the gradient of its weight. And all rows once more through the linear layers, where the start model's
    hidden states are computed.
    """
    products = 3 if batch.repeats_base or model.lora is None else 2
    head = products * architecture.embedding_parameters * batch.compared_rows
    return 2.0 * head + base_flops(architecture, batch)


def base_flops(architecture: Architecture, batch: MicroBatch) -> float:
    """Executed in the linear layers of the start model's forward pass; 0 where there is none."""
    once = architecture.layers * architecture.layer_matrix_elements * batch.rows
    return 2.0 * once if batch.repeats_base else 0.0


def head_repeats_logits(model: ModelSpec, targets: float) -> bool:
    """Whether the head computes logits a second time, for its weight's gradient."""
    has_many_chunks = targets > LOW_PRECISION_CHUNKS * model.loss_chunk_rows
    return model.lora is None and model.dtype == "bf16" and has_many_chunks


def attention_flops(
    architecture: Architecture, model: ModelSpec, visits: Iterable[Visits], *, repeats_base: bool = False
) -> float:
    """Executed in attention, given the pairs that the kernels visit in one layer: forward, backward and recomputation.

    `repeats_base`: the start model's forward pass is among it.

    Two operations per dimension of a head, pair and product. With LoRA the first layer has no backward pass of it where
    none of q, k and v is adapted (of the oracle it has part of one, where some are).
    """
    forward = architecture.layers * (2 if repeats_base else 1) + recomputed_layers(architecture, model)
    has_gradient = model.lora is None or bool({"q_proj", "k_proj", "v_proj"} & set(model.lora.targets))
    backward = architecture.layers - (0 if has_gradient else 1)
    products = sum(v.pairs * (forward * v.kernel.forward + backward * v.kernel.backward) for v in visits)
    return 2.0 * architecture.heads * architecture.head_dim * products
