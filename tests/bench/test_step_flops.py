"""The operations of a step: against torch's own count, against every visible pair counted, and the table of GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.model.build import TrainableModel
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from tests.bench.small_model import CONFIG, random_documents, small_model
from tools.bench.step_flops import ModelFlops, peak_tflops, visible_pairs

NTP = NextTokenPrediction(spec=NtpSpec())
BICO = MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.4)), placeholder_id=0)


def batch(objective: NextTokenPrediction | MaskDenoising, *lengths: int) -> PackedBatch:
    return objective.build(*random_documents(*lengths))


def counted(trainable: TrainableModel, packed: PackedBatch) -> int:
    """Operations by torch's dispatcher, forward and backward; it does not know the product that the head adds in place.

    Without the angles of the rotation, which transformers 5.17 computes as a product.
    """
    known = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        trainable(packed).backward()
    by_module = counter.get_flop_counts()
    angles = sum(sum(by_module[name].values()) for name in by_module if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("objective", [NTP, BICO], ids=["ntp", "bico"])
@pytest.mark.parametrize(
    "lora", [None, {"rank": 4, "alpha": 8, "dropout": 0.0}], ids=["all weights", "adapters"]
)
def test_the_products_of_a_step_are_those_that_torch_counts(objective, lora):
    trainable, packed = small_model(lora=lora, attention_backend="oracle"), batch(objective, 9, 30, 2)
    flops, rows = ModelFlops.of(trainable), len(packed.input_ids)
    products = flops.of_step(packed) - flops.per_pair * visible_pairs(packed.plan)
    # The oracle multiplies all rows with all, in 3 products (scores of both rotations, values) and 6 in the backward pass.
    oracle = (
        9 * 2 * rows**2 * CONFIG["num_attention_heads"] * CONFIG["head_dim"] * CONFIG["num_hidden_layers"]
    )
    # Torch sees no gradient for the input of the first layer's frozen q, k and v, nor of their adapters.
    unseen = 0 if lora is None else first_inputs(trainable) * rows
    assert counted(trainable, packed) == products + oracle - unseen


def first_inputs(trainable: TrainableModel) -> int:
    """Operations per row for the gradient of what enters the first layer's attention."""
    attention = trainable.causal_lm.model.layers[0].self_attn
    weights = [
        p for part in (attention.q_proj, attention.k_proj, attention.v_proj) for p in part.parameters()
    ]
    is_input = [p for p in weights if p.shape[1] == CONFIG["hidden_size"]]
    return sum(2 * p.numel() for p in is_input)


def test_attention_counts_what_a_dense_product_of_one_document_would():
    """One document in which every row sees every kept one: two products forward, four backward."""
    trainable, packed = small_model(), batch(BICO, 40)
    kept, rows = packed.plan.num_kept, packed.plan.num_rows
    q = torch.randn(4, rows, 16, requires_grad=True)
    k, v = (torch.randn(4, kept, 16, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        (torch.bmm(torch.bmm(q, k.mT), v)).sum().backward()
    ours = ModelFlops.of(trainable).per_pair * visible_pairs(packed.plan)
    assert ours == 2 * counter.get_total_flops()  # two layers


@pytest.mark.parametrize("objective", [NTP, BICO], ids=["ntp", "bico"])
def test_every_visible_pair_is_counted_once(objective):
    plan = batch(objective, *np.random.default_rng().integers(1, 20, 6)).plan
    document = [d for d, n in enumerate(plan.cu_seqlens.diff().tolist()) for _ in range(n)]
    position = [p for n in plan.cu_seqlens.diff().tolist() for p in range(n)]
    queries = list(zip(document, position, strict=True)) + [(d, None) for d in plan.live_document.tolist()]
    pairs = sum(
        d == other and (plan.mode == "bidirectional" or other_position <= p)
        for d, p in queries
        for other, other_position in zip(document, position, strict=True)
    )
    assert visible_pairs(plan) == pairs


def test_a_step_at_8b_shape_costs_what_the_formula_by_hand_says():
    """Llama-3-8B's decoder layer: 218,103,808 weights in matrices; one document of 2048 tokens, by next tokens."""
    flops = ModelFlops(per_row=6 * 4 * 218_103_808, per_target=6 * 128256 * 4096, per_pair=12 * 4 * 32 * 128)
    packed = batch(NTP, 2048)
    by_hand = 6 * 4 * 218_103_808 * 2048 + 6 * 128256 * 4096 * 2047 + 12 * 4 * 4096 * 2048 * 2049 // 2
    assert flops.of_step(packed) == by_hand


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_a_gpu_s_peak_is_that_of_its_data_sheet(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "GRID A100-10C",
        "NVIDIA L40S-12Q",
    ],
)
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name):
    assert peak_tflops(name) is None
