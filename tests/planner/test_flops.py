"""Executed operations are those that torch counts in real steps; useful ones are PaLM's; visits are those of the kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bico_ds.attention import backends
from bico_ds.attention.layout import CPU_POLICY, TILES_POLICY, Layout, LayoutPolicy, build_layout
from bico_ds.attention.plan import AttentionPlan
from bico_ds.batch import ComparedRows, PackedBatch, TeacherRows
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.native.library import native_refusal
from bico_ds.objectives.abi import BlankInfilling
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.compute.attention import (
    DENSE_BIDIRECTIONAL,
    DENSE_CAUSAL,
    FLASH,
    ORACLE,
    TRITON,
    Kernel,
    Visits,
    expected_visits,
)
from bico_ds.planner.flops import attention_flops, comparison_flops, head_flops, linear_flops, step_flops
from bico_ds.planner.workload import MicroBatch, Texts, micro_batches
from tests.bench.small_model import CONFIG, random_documents

ATEN, META = torch.ops.aten, torch.device("meta")
TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
# What torch's counter does not know: the product that the head adds in place, and the flash kernel for CPUs, which it would
# count as it counts the one for CUDA: whole rectangles, causal or not.
FORMULAS = {
    ATEN.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
TWO_PASS = replace(CPU_POLICY, flash_from=1, hidden_cost=float("inf"))
POLICIES = {
    "dense": replace(TILES_POLICY, tile_scores=300, tile_min_rows=4),
    "two-pass": TWO_PASS,
    "hidden keys": replace(TWO_PASS, hidden_cost=1.0, tile_cost=1e9),
    "two-pass and dense": replace(TWO_PASS, flash_from=9),
}
OBJECTIVES = {
    "ntp": NextTokenPrediction(spec=NtpSpec()),
    "bico": MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.4)), placeholder_id=0),
}

WITH_SPANS = {**OBJECTIVES, "abi": BlankInfilling(spec=AbiSpec(mask=MaskSpec(rate=0.7)), special_ids=())}


def adapters(*targets: str) -> dict[str, Any]:
    return {"rank": 4, "alpha": 8, "dropout": 0.0, **({"targets": targets} if targets else {})}


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, every layer recomputed": {"dtype": "bf16", "activation_checkpointing": 1},
    "every second layer recomputed": {"activation_checkpointing": 2},
    "tied head, its gradient by vocabulary": {
        "config": {"tie_word_embeddings": True}, "dtype": "bf16", "loss_chunk_rows": 2,
    },
    "tied head in fp32, many chunks": {"config": {"tie_word_embeddings": True}, "loss_chunk_rows": 2},
    "biases": {
        "config": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        "activation_checkpointing": 3,
    },
    "norms of q and k": {"config": {"model_type": "qwen3", "num_key_value_heads": 4}},
    "adapters": {"lora": adapters(), "dtype": "bf16", "loss_chunk_rows": 2},
    "adapters, recomputed": {"lora": adapters(), "activation_checkpointing": 1},
    "adapters of some": {"lora": adapters("q_proj", "k_proj", "v_proj", "up_proj"), "activation_checkpointing": 2},
    "adapters behind attention": {"lora": adapters("o_proj"), "activation_checkpointing": 1},
    "adapters of the gate": {"lora": adapters("gate_proj")},
    "adapters of the last": {"lora": adapters("down_proj"), "activation_checkpointing": 1},
}  # fmt: skip


@contextmanager
def policy_of_cpus(policy: LayoutPolicy) -> Iterator[None]:
    """`auto` on a CPU has this policy within, as on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CPU_FUSED_POLICY", "CPU_POLICY", "CPU_HALF_POLICY"):
            patch.setattr(backends, name, policy)
        backends.resolve.cache_clear()
        yield
    backends.resolve.cache_clear()


def counted(model: TrainableModel, batch: PackedBatch) -> int:
    """Operations by torch's dispatcher, forward and backward, without the angles of the rotation.

    Transformers 5.17 computes those as a product.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(batch).loss.backward()
    by_module = counter.get_flop_counts()
    angles = sum(sum(by_module[name].values()) for name in by_module if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def rectangles(layout: Layout) -> list[Visits]:
    """By the counter's convention: in a flash pass all of a document's queries times all its keys; in tiles all scores."""
    passes = [(g.plan.cu_seqlens, g.plan.flip_cu_seqlens) for g in layout.flash]
    squares = sum(float((cu.diff().double() ** 2).sum()) for both in passes for cu in both)
    dense = DENSE_CAUSAL if layout.outline.mode == "causal" else DENSE_BIDIRECTIONAL
    tiles = sum(float(np.prod(tile.shape)) for tile in layout.tiles)
    return [Visits(kernel=FLASH, pairs=squares), Visits(kernel=dense, pairs=tiles)]


def built(backend: str, variant: dict[str, Any]) -> tuple[ModelSpec, TrainableModel]:
    values = {"dtype": "fp32", "attention_backend": backend, **variant}
    values["config"] = {**CONFIG, "num_hidden_layers": 3, **variant.get("config", {})}
    spec = ModelSpec.model_validate(values)
    return spec, build_model(spec, seed=1, ds_config=None, device="cpu").train()


CASES = [("two-pass and dense", variant) for variant in VARIANTS] + [
    (path, variant)
    for path in ("dense", "two-pass", "hidden keys", "oracle")
    for variant in ("bf16, every layer recomputed", "adapters", "adapters behind attention")
]


@pytest.mark.parametrize(("path", "variant"), CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_executed_is_what_torch_counts(path, objective, variant):
    lengths = np.random.default_rng().integers(1, 30, 7)
    batch = OBJECTIVES[objective].build(*random_documents(*lengths, 40))
    policy = POLICIES.get(path, TWO_PASS)
    with policy_of_cpus(policy):
        spec, model = built("oracle" if path == "oracle" else "auto", VARIANTS[variant])
        layout = build_layout(batch.plan, policy)
        found = counted(model, replace(batch, layout=layout))
    rows = len(batch.input_ids)
    visits = [Visits(kernel=ORACLE, pairs=rows**2)] if path == "oracle" else rectangles(layout)
    assert found == executed(spec, rows, len(batch.targets), visits)


def executed(spec: ModelSpec, rows: int, targets: int, visits: list[Visits]) -> float:
    architecture = read_architecture(spec)
    products = linear_flops(architecture, spec, rows) + head_flops(architecture, spec, targets)
    return products + attention_flops(architecture, spec, visits)


@pytest.mark.parametrize("stored", [False, True], ids=["start model's pass", "stored"])
def test_a_divergence_executes_what_the_plan_adds(stored):
    batch = OBJECTIVES["ntp"].build(*random_documents(*np.random.default_rng().integers(2, 30, 7)))
    index = torch.arange(0, len(batch.targets), 2)
    kept = torch.full((len(index), 3), 0.1)
    ids = torch.arange(3).expand(len(index), 3)
    teacher = (
        TeacherRows(ids=ids, log_probs=kept.log(), target_log_probs=kept[:, 0].log()) if stored else None
    )
    with policy_of_cpus(TWO_PASS):
        spec, model = built("auto", VARIANTS["fp32" if stored else "adapters"])
        batch = replace(batch, layout=build_layout(batch.plan, TWO_PASS))
        compared = ComparedRows(index=index, teacher=teacher)
        added = counted(model, replace(batch, compared=compared)) - counted(model, batch)
    architecture, visits = read_architecture(spec), rectangles(batch.layout)
    planned = replace(counts(batch), compared_rows=len(index), repeats_base=not stored)
    passes = [
        attention_flops(architecture, spec, visits, repeats_base=again) for again in (not stored, False)
    ]
    assert added == comparison_flops(architecture, spec, planned) + passes[0] - passes[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_recipe_of_llama_3_8b_executes_on_a_gpu_what_torch_counts(dtype, objective):
    """Of one document: on the meta device the counter takes all of a batch to be as long as the longest."""
    config = {**load_recipe("llama3_8b_bico").model.config, "num_hidden_layers": 2}
    spec = ModelSpec.model_validate({"config": config, "dtype": dtype, "activation_checkpointing": 1})
    model = build_model(spec, seed=1, ds_config=None, device=META).train()
    batch = OBJECTIVES[objective].build(*random_documents(700))
    policy = backends.resolve("auto", model.config.dtype, 128, META).policy
    layout = build_layout(batch.plan, policy)
    assert bool(layout.flash) == (dtype == "bf16")
    found = counted(model, replace(batch, layout=layout).to(META))
    assert found == executed(spec, len(batch.input_ids), len(batch.targets), rectangles(layout))


def counts(batch: PackedBatch) -> MicroBatch:
    """What the planner expects of an average batch, of this one."""
    return MicroBatch(
        objective="ntp", probability=1.0, mode=batch.plan.mode, documents=batch.plan.num_documents, longest=0,
        tokens=batch.represented_tokens, kept_rows=batch.plan.num_kept, live_rows=batch.plan.num_live,
        pairs=batch.plan.num_pairs, head_rows=len(batch.targets), span_pairs=pairs_in_spans(batch.plan),
    )  # fmt: skip


def pairs_in_spans(plan: AttentionPlan) -> float:
    spans = torch.zeros(0) if plan.span_cu_seqlens is None else plan.span_cu_seqlens.diff().double()
    return float((spans * (spans + 1) / 2).sum())


def kernels_visits(layout: Layout) -> dict[Kernel, float]:
    """Pairs that kernels visit which stop exactly at the diagonal, and tiles without padding."""
    pairs: dict[Kernel, float] = defaultdict(float)
    passes = [cu for group in layout.flash for cu in (group.plan.cu_seqlens, group.plan.flip_cu_seqlens)]
    for n in torch.cat([cu.diff() for cu in passes]).tolist() if passes else []:
        pairs[FLASH] += n * (n + 1) / 2
    causal = layout.outline.mode == "causal"
    for tile in layout.tiles:
        is_query = (tile.query_slots < layout.outline.num_rows).view(tile.split.shape)
        pairs[DENSE_CAUSAL if causal else DENSE_BIDIRECTIONAL] += float(
            (is_query.sum(1) * tile.key_count).sum()
        )
    if (fused := layout.fused) is not None:
        keys = fused.split if causal else fused.key_counts * fused.offsets.diff()
        pairs[FLASH] += float(keys.sum())
    if (blocks := layout.blocks) is not None:
        begin, end, _, count = blocks.query_blocks.long().T
        pairs[TRITON] += float((blocks.split if causal else (end - begin) * count).sum())
    if layout.spans is not None and layout.spans.layout is not None:
        for kernel, visited in kernels_visits(layout.spans.layout).items():
            pairs[kernel] += visited
    return pairs


@pytest.mark.parametrize("objective", WITH_SPANS)
@pytest.mark.parametrize(
    ("backend", "dtype", "device"),
    [
        ("auto", "bf16", "meta"),
        ("aten-cuda", "bf16", "meta"),
        ("triton", "bf16", "meta"),
        ("auto", "fp32", "meta"),
        ("triton", "fp32", "meta"),
        ("auto", "bf16", "cpu"),
        ("cpu-flash", "fp32", "cpu"),
    ],
)
def test_the_visits_that_are_expected_are_those_of_the_backend_s_kernels(backend, dtype, device, objective):
    if device == "cpu" and native_refusal():
        pytest.skip(f"the fused kernel {native_refusal()}")
    batch = WITH_SPANS[objective].build(*random_documents(*np.random.default_rng().integers(150, 500, 30)))
    resolved = backends.resolve(backend, getattr(torch, TORCH_NAMES[dtype]), 64, torch.device(device))
    visited = kernels_visits(build_layout(batch.plan, resolved.policy))
    spec = ModelSpec.model_validate({"config": CONFIG, "dtype": dtype, "attention_backend": backend})
    expected = expected_visits(spec, counts(batch), on_cuda=device == "meta")
    assert {visits.kernel: visits.pairs for visits in expected if visits.pairs} == pytest.approx(
        visited, rel=0.05
    )


def test_a_step_at_8b_shape_is_what_the_formula_by_hand_says():
    """Llama-3-8B's decoder layer: 218,103,808 weights in matrices; one document of 2048 tokens, by next tokens."""
    texts = Texts(lengths=np.array([2048]), tokens=None, source="")
    recipe = load_recipe("llama3_8b_bico", ["data.capacity=2048", "training.micro_batch_bins=1"])
    (ntp,) = (b for b in micro_batches(recipe, texts) if b.objective == "ntp")
    model = recipe.model.model_copy(update={"path": None, "activation_checkpointing": 1})
    flops = step_flops(read_architecture(model), model, ntp)
    layers, head, pairs = 32 * 218_103_808 * 2048, 128_256 * 4096 * 2047, 32 * 4096 * 2048 * 2049 // 2
    assert flops.useful == 6 * layers + 6 * head + 12 * pairs
    assert flops.products == 8 * layers - 2 * 32 * 4096 * 14_336 * 2048 + 6 * head
    assert flops.attention == (2 * 2 + 2 * 2 + 5 * 2) * pairs
    assert flops.executed == flops.products + flops.attention
