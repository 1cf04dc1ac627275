"""The useful operations of a step on a real batch, against torch's own count; and the peaks of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bico_ds.batch import PackedBatch
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.build import TrainableModel
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.devices import device_named
from bico_ds.planner.flops import useful_flops
from tests.bench.small_model import CONFIG, random_documents, small_model
from tests.planner.test_flops import counted
from tools.bench.step_flops import flops_of_step, head_share

NTP = NextTokenPrediction(spec=NtpSpec())
BICO = MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.4)), placeholder_id=0)


PER_PAIR = 12 * CONFIG["num_hidden_layers"] * CONFIG["num_attention_heads"] * CONFIG["head_dim"]


def spec_of(lora: dict[str, Any] | None = None) -> ModelSpec:
    return ModelSpec.model_validate({"config": CONFIG, "dtype": "fp32", "lora": lora})


def batch(objective: NextTokenPrediction | MaskDenoising, *lengths: int) -> PackedBatch:
    return objective.build(*random_documents(*lengths))


@pytest.mark.parametrize("objective", [NTP, BICO], ids=["ntp", "bico"])
@pytest.mark.parametrize(
    "lora", [None, {"rank": 4, "alpha": 8, "dropout": 0.0}], ids=["all weights", "adapters"]
)
def test_the_products_of_a_step_are_those_that_torch_counts(objective, lora):
    trainable, packed = small_model(lora=lora, attention_backend="oracle"), batch(objective, 9, 30, 2)
    rows = len(packed.input_ids)
    products = flops_of_step(spec_of(lora), packed) - PER_PAIR * packed.plan.num_pairs
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
    packed = batch(BICO, 40)
    kept, rows = packed.plan.num_kept, packed.plan.num_rows
    q = torch.randn(4, rows, 16, requires_grad=True)
    k, v = (torch.randn(4, kept, 16, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        (torch.bmm(torch.bmm(q, k.mT), v)).sum().backward()
    model = spec_of()
    rows_and_head = useful_flops(
        read_architecture(model), model, rows=rows, targets=len(packed.targets), pairs=0
    )
    assert flops_of_step(model, packed) - rows_and_head == 2 * counter.get_total_flops()  # two layers


def test_a_step_at_8b_shape_costs_what_the_formula_by_hand_says():
    """Llama-3-8B's decoder layer: 218,103,808 weights in matrices; one document of 2048 tokens, by next tokens."""
    recipe = load_recipe("llama3_8b_bico", ["model.path=null", "model.config.num_hidden_layers=4"])
    packed = batch(NTP, 2048)
    head = 6 * 128256 * 4096 * 2047
    by_hand = 6 * 4 * 218_103_808 * 2048 + head + 12 * 4 * 4096 * 2048 * 2049 // 2
    assert flops_of_step(recipe.model, packed) == by_hand
    assert head_share(recipe.model, packed) == head / by_hand


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
    assert device_named(name).bf16_flops == pytest.approx(1e12 * peak, rel=1e-3)
