"""The planner's activations are what a real model keeps and makes: bytes of live tensors, counted operation by operation.

On a CPU the model runs as in training; what CUDA would run is run on the meta device, where autograd keeps what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from bico_ds.attention import tiles
from bico_ds.attention.layout import CUDA_POLICY, TILES_POLICY
from bico_ds.attention.plan import AttentionPlan
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.head import LOW_PRECISION_CHUNKS
from bico_ds.planner import activations
from bico_ds.planner.activations import activation_memory
from bico_ds.planner.architecture import architecture_of
from bico_ds.planner.compute.attention import SPAN_FLASH_FROM
from bico_ds.planner.items import total
from bico_ds.planner.rows.attention import MASKED_SCORES, TILE_ROWS, TILE_SCORES, largest_tiles
from bico_ds.planner.rows.case import case_of
from bico_ds.planner.rows.kept import layer_tensors
from bico_ds.planner.workload import MicroBatch
from tests.planner.live_memory import LiveMemory
from tests.planner.measured_rows import counts_of, draw_batch, measure

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
NTP: dict[str, Any] = {"kind": "ntp"}
BICO: dict[str, Any] = {"kind": "bico"}
ABI: dict[str, Any] = {"kind": "abi", "mask": {"rate": 0.6}, "spans": "left_to_right"}
MANY_LIVE: dict[str, Any] = {"kind": "bico", "mask": {"rate": 0.6}}


def random_spec(rng: np.random.Generator, **values: Any) -> ModelSpec:
    """A model of 3 to 5 layers whose sizes are in usual proportions; `family` and the spec's own keys are given."""
    family = values.pop("family", "llama")
    key_heads, head_dim = int(rng.integers(1, 3)), 8 * int(rng.integers(5, 8))
    heads = key_heads * int(rng.integers(1, 4))
    hidden = heads * head_dim
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": int(hidden * rng.uniform(2.5, 4)),
        "num_hidden_layers": int(rng.integers(3, 6)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "vocab_size": int(rng.integers(300, 1000)),
    }
    if family == "qwen2":  # which has no such key
        del config["head_dim"]
    return ModelSpec(config=config, **{"loss_chunk_rows": int(rng.integers(50, 300))} | values)


def built(spec: ModelSpec, device: str) -> TrainableModel:
    return build_model(spec, seed=1, ds_config=None, device=device, longest_document=4000).train()


def has_likely_tiles(plan: AttentionPlan) -> bool:
    """Whether no document has more live rows than are planned: two standard deviations above the longest one's mean."""
    mean = plan.max_seqlen * plan.num_live / plan.num_kept
    return not plan.num_live or int(plan.live_document.bincount().max()) <= mean + 2 * math.sqrt(mean)


def compare(
    spec: ModelSpec,
    objective: dict[str, Any],
    device: str,
    *,
    within: float,
    lengths: tuple[int, int] = (150, 900),
    **how: Any,
) -> None:
    """Plan and run one random micro-batch; bytes in the head and outside of it must agree."""
    rng = np.random.default_rng()
    assert spec.config is not None
    shapes = architecture_of(spec.config, source="model.config")
    sizes = {shapes.vocabulary, *(size for x in shapes.linears for size in (x.inputs, x.outputs))}
    while True:  # a tensor of rows that has the shape of a weight would be taken for its gradient
        batch = draw_batch(objective, rng.integers(*lengths, int(rng.integers(2, 5))), spec, shapes, device)
        if not sizes & {batch.plan.num_rows, len(batch.targets)} and has_likely_tiles(batch.plan):
            break
    plan = activation_memory(shapes, spec, counts_of(batch), on_cuda=device != "cpu", **how)
    found = measure(built(spec, device), batch.to(device))
    for name, items, bytes_found in (
        ("head", plan.in_head, found.in_head),
        ("layers", plan.in_layer, found.in_layers),
        *([("forward pass", plan.passing, found.before_head)] if spec.activation_checkpointing == 1 else []),
    ):
        planned = total((*plan.kept, *items))
        says = f"{name}: planned {planned}, found {bytes_found}; {spec}; {batch.plan.outline}"
        assert planned.low * (1 - within) <= bytes_found <= planned.high * (1 + within), says


LORA = {"dropout": LoraSpec(rank=5, dropout=0.1), "no dropout": LoraSpec(rank=5, dropout=0.0)}


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("objective", [NTP, BICO, MANY_LIVE, ABI], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_keeps_and_makes_what_is_planned(dtype, objective, recompute):
    spec = random_spec(np.random.default_rng(), dtype=dtype, activation_checkpointing=recompute)
    compare(spec, objective, "cpu", within=0.02)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("adapters", LORA)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_with_adapters_keeps_and_makes_what_is_planned(dtype, adapters, recompute):
    rng = np.random.default_rng()
    spec = random_spec(rng, dtype=dtype, lora=LORA[adapters], activation_checkpointing=recompute)
    compare(spec, BICO, "cpu", within=0.02)


def test_the_peak_may_be_in_a_recomputed_layer_before_one_that_is_kept():
    spec = random_spec(np.random.default_rng(), lora=LORA["dropout"], activation_checkpointing=2)
    assert spec.config is not None
    even = spec.model_copy(update={"config": spec.config | {"num_hidden_layers": 4}})
    compare(even, NTP, "cpu", within=0.02)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("objective", [NTP, BICO], ids=str)
@pytest.mark.parametrize("backend", ["auto", "aten-cuda"])
def test_what_cuda_runs_keeps_and_makes_what_is_planned(backend, objective, recompute):
    values = {"attention_backend": backend, "activation_checkpointing": recompute}
    compare(random_spec(np.random.default_rng(), **values), objective, "meta", within=0.02)


@pytest.mark.parametrize(("backend", "lengths"), [("auto", (80, 170)), ("triton", (150, 900))])
def test_what_cuda_runs_over_spans_keeps_and_makes_what_is_planned(backend, lengths):
    values = {"attention_backend": backend, "activation_checkpointing": 1}
    compare(random_spec(np.random.default_rng(), **values), ABI, "meta", within=0.02, lengths=lengths)


def test_spans_that_the_flash_kernel_serves_take_what_is_planned_but_for_a_sixth():
    """Where spans are of several lengths, Triton serves some: both ways' gradients are there, which is not planned."""
    spec = random_spec(np.random.default_rng(), attention_backend="auto", activation_checkpointing=1)
    compare(spec, ABI, "meta", within=0.16)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("adapters", LORA)
def test_what_cuda_runs_with_adapters_keeps_and_makes_what_is_planned(adapters, recompute):
    rng = np.random.default_rng()
    spec = random_spec(rng, lora=LORA[adapters], activation_checkpointing=recompute)
    compare(spec, NTP, "meta", within=0.02)


@pytest.mark.parametrize("recompute", [0, 1])
def test_stage_3_keeps_the_inputs_of_frozen_layers(monkeypatch, recompute):
    """Its function in the place of `torch.nn.functional.linear` does, which DeepSpeed sets for the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    spec = random_spec(np.random.default_rng(), lora=LORA["dropout"], activation_checkpointing=recompute)
    compare(spec, BICO, "cpu", within=0.02, zero3=True)


@pytest.mark.parametrize("objective", [NTP, BICO, MANY_LIVE], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_biases_and_norms_of_queries_and_keys_are_planned(device, family, objective):
    compare(random_spec(np.random.default_rng(), family=family), objective, device, within=0.05)


def test_the_triton_kernels_keep_what_is_planned():
    """What their backward pass makes, the meta device does not show; the head's peak is the rows that are kept."""
    spec = random_spec(np.random.default_rng(), attention_backend="triton")
    assert spec.config is not None
    shapes = architecture_of(spec.config, source="model.config")
    batch = draw_batch(MANY_LIVE, [700, 300, 41], spec, shapes, "meta")
    plan = activation_memory(shapes, spec, counts_of(batch), on_cuda=True)
    found = measure(built(spec, "meta"), batch.to("meta"))
    assert total((*plan.kept, *plan.in_head)).middle == pytest.approx(found.in_head, rel=0.02)


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator had given out at once, above those of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    changes: list[tuple[int, int]] = []
    nodes = profiler.profiler.kineto_results.experimental_event_tree()
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))


def test_live_memory_is_what_the_allocator_gives():
    """Torch's profiler sees every allocation on a CPU, those within an operation too."""
    spec = random_spec(np.random.default_rng(), activation_checkpointing=1)
    assert spec.config is not None
    shapes = architecture_of(spec.config, source="model.config")
    batch, model = draw_batch(BICO, [600, 301], spec, shapes, "cpu"), built(spec, "cpu")
    model(batch).loss.backward()
    model.zero_grad()
    with LiveMemory((), read=model.parameters()) as live:
        before = live.bytes
        model(batch).loss.backward()
    model.zero_grad()
    assert live.peak - before == pytest.approx(allocated(lambda: model(batch).loss.backward()), rel=0.01)


def test_the_table_of_kept_tensors_names_what_is_kept():
    """Of Llama's layer in bf16: by hand, from the sources that the table names."""
    spec = ModelSpec(config={**LLAMA, "num_key_value_heads": 2})
    shapes = architecture_of(spec.config or {}, source="model.config")
    table = layer_tensors(case_of(shapes, spec, on_cuda=True, zero3=False))
    hidden, queries, keys, wide, heads = 64, 64, 32, 200, 4
    norms = 2 * (2 * hidden + 2 * hidden + 4)
    assert sum(tensor.bytes for tensor in table) == (
        norms + 2 * (2 * queries + 2 * keys + 3 * wide) + 4 * heads
    )
    assert all(tensor.source for tensor in table) and len({t.name for t in table}) == len(table)


def test_a_larger_share_of_live_rows_is_planned_with_larger_tiles():
    """Beside a named flash kernel, up to the bound of the layout's policy; other kernels for live rows have no tiles."""
    shapes = architecture_of(LLAMA, source="model.config")
    spec = ModelSpec(config=LLAMA, attention_backend="aten-cuda")
    few, many = (
        MicroBatch(
            objective="bico",
            probability=1.0,
            mode="bidirectional",
            documents=1,
            longest=9_000,
            tokens=10_000,
            kept_rows=9_000,
            live_rows=live,
            pairs=9_000 * (9_000 + live),
            head_rows=1_000,
        )
        for live in (50, 1_000)
    )
    largest = [
        largest_tiles(case_of(shapes, spec, on_cuda=True, zero3=False), b)[0].scores for b in (few, many)
    ]
    assert largest == [50 * 9_000, TILE_SCORES]
    for without in (
        case_of(shapes, spec, on_cuda=False, zero3=False),
        case_of(shapes, ModelSpec(config=LLAMA), on_cuda=True, zero3=False),
    ):
        assert largest_tiles(without, many)[1].scores == 0


def test_the_constants_that_the_planner_repeats_are_those_of_attention_and_head():
    assert (CUDA_POLICY.tile_scores, CUDA_POLICY.tile_min_rows) == (TILE_SCORES, TILE_ROWS)
    assert (TILES_POLICY.tile_scores, TILES_POLICY.tile_min_rows) == (TILE_SCORES, TILE_ROWS)
    assert CUDA_POLICY.span_flash_from == TILES_POLICY.span_flash_from == SPAN_FLASH_FROM
    assert MASKED_SCORES == tiles._KEPT_SCORES
    assert activations.LOW_PRECISION_CHUNKS == LOW_PRECISION_CHUNKS
