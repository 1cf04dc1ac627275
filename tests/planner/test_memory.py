"""Planned device memory: its terms against sums written down here, and what must grow with what."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture, read_architecture
from bico_ds.planner.deployment import Deployment, Zero, read_zero
from bico_ds.planner.devices import DEVICES, Device
from bico_ds.planner.items import Item, total
from bico_ds.planner.memory import MemoryPlan, device_memory
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import Texts, micro_batches
from bico_ds.planner.zero.gathering import gathered
from bico_ds.planner.zero.modules import Parameter, modules_of, parameters_of
from bico_ds.planner.zero.reduction import Bucket

GPU = DEVICES["h100-80g"]
CPU = dataclasses.replace(GPU, kind="cpu")
TEXTS = Texts(lengths=np.full(100, 300), tokens=None, source="a test")


def planned(recipe: Recipe, *, ranks: int = 64, device: Device = GPU) -> MemoryPlan:
    architecture = read_architecture(recipe.model)
    zero = read_zero(
        recipe,
        hidden_size=architecture.hidden,
        ranks=ranks,
        ranks_per_node=min(ranks, 8),
        on_cuda=device.kind == "cuda",
    )
    deployment = Deployment(device=device, nodes=max(1, ranks // 8), ranks_per_node=min(ranks, 8), zero=zero)
    return device_memory(recipe, architecture, deployment, micro_batches(recipe, TEXTS))


def llama(*overrides: str) -> Recipe:
    return load_recipe("llama70b_bico", list(overrides))


def bytes_of(items: tuple[Item, ...], name: str) -> float:
    return sum(item.bytes.high for item in items if item.name == name)


def test_states_of_70_billion_parameters_on_64_ranks_are_18_bytes_each_divided_by_64() -> None:
    resident = planned(llama()).resident
    share = 70_553_706_496 / 64
    expected = {
        "weights, partition": 2,
        "accumulated gradients": 4,
        "master weights": 4,
        "optimizer's moments": 8,
    }
    for name, size in expected.items():
        assert bytes_of(resident, name) == pytest.approx(size * share, rel=1e-6), name
    assert bytes_of(resident, "reduce bucket") == 4 * 8192**2
    small = 2 * (2 * 80 + 1) * 8192
    assert bytes_of(resident, "persistent parameters") == small


def test_what_cublas_takes_is_planned_as_an_h200_held_it_beside_the_tensors_of_a_step() -> None:
    """Measured minus planned before: 0.067 GB at rest (docs/benchmarks/gpu.md), and 0.0899 minus 0.022 of a tiny run."""
    (workspaces,) = (i for i in planned(llama(), device=DEVICES["h200"]).resident if "cuBLAS" in i.name)
    assert workspaces.is_tensor and workspaces.bytes == Range.exactly(2 * 32 * 2**20)
    assert workspaces.bytes.high == pytest.approx(34.75e9 - 34.683e9, abs=1e6)
    assert workspaces.bytes.high == pytest.approx(0.0899e9 - 0.022e9, abs=2e6)


@pytest.mark.parametrize("name", [*DEVICES, "a GPU of mine"])
def test_every_gpu_has_workspaces_of_cublas_and_a_cpu_has_none(name: str) -> None:
    device = DEVICES.get(name) or dataclasses.replace(GPU, name=name)
    (workspaces,) = (i for i in planned(llama(), device=device).resident if "cuBLAS" in i.name)
    known = name in DEVICES and name != "mi300x"
    assert (workspaces.bytes.low == workspaces.bytes.high) == known
    if known:  # as torch names them: sm_90 and newer, or Ampere and Ada
        assert workspaces.bytes.high == 2 * (2**25 if {"h", "b"} & {*name.split("-")[0]} else 8_519_680)
    assert not any("cuBLAS" in item.name for item in planned(llama(), device=CPU).resident)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_zero_2_keeps_all_weights_and_divides_the_optimizer(ranks: int) -> None:
    resident = planned(llama("deepspeed.config=zero2_bf16"), ranks=ranks).resident
    assert bytes_of(resident, "weights") == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    states = bytes_of(resident, "master weights") + bytes_of(resident, "optimizer's moments")
    assert states == pytest.approx(12 * 70_553_706_496 / ranks, rel=1e-6)


def test_every_item_is_within_its_bounds_and_says_where_it_comes_from() -> None:
    for recipe in (
        "llama70b_bico",
        "llama70b_bico_lora",
        "llama70b_bico_offload",
        "tiny_bico",
    ):
        for device, ranks in itertools.product((GPU, CPU), (1, 8)):
            plan = planned(
                load_recipe(recipe, [f"training.global_batch_bins={4 * ranks}"]), ranks=ranks, device=device
            )
            for moment in plan.moments:
                assert {item.name for item in plan.resident} <= {item.name for item in moment.items}
                for item in moment.items:
                    assert 0 <= item.bytes.low <= item.bytes.high and item.how, item


@functools.cache
def peak(*overrides: str, ranks: int = 64, device: Device = GPU) -> float:
    return planned(llama(*overrides), ranks=ranks, device=device).peak.bytes.high


def test_memory_grows_with_rows_and_shrinks_with_ranks_recomputation_lora_and_offload() -> None:
    assert peak("training.micro_batch_bins=2", "training.global_batch_bins=128") > peak()
    assert peak("data.capacity=4096") > peak()
    assert peak(ranks=32) > peak()
    assert peak("model.activation_checkpointing=0") > peak("model.activation_checkpointing=2") > peak()
    assert peak("model.lora={}") < peak()
    assert peak("deepspeed.config=zero3_offload_cpu") < peak()
    assert peak("deepspeed.config=zero3_hpz") > peak()
    assert peak("deepspeed.config=zero2_bf16") > peak()
    assert peak("deepspeed.overrides.zero_optimization.reduce_bucket_size=500000000") > peak()


def test_offloaded_states_are_not_on_a_gpu_but_they_are_in_a_cpu_runs_memory() -> None:
    offload = llama("deepspeed.config=zero3_offload_cpu")
    assert not bytes_of(planned(offload).resident, "master weights")
    here = planned(offload, device=CPU).resident
    per_parameter = total(here).high / (70_553_706_496 / 64)
    assert per_parameter == pytest.approx(2 + 12 + 4 + 4, rel=0.02)


def shapes(layers: int = 3, *, tied: bool = False) -> Architecture:
    config = {"vocab_size": 500, "hidden_size": 48, "num_hidden_layers": layers, "num_attention_heads": 6,
              "num_key_value_heads": 2, "intermediate_size": 100, "tie_word_embeddings": tied}  # fmt: skip
    return read_architecture(load_recipe("tiny_base", [f"model.config={config}"]).model)


def zero_with(**values: int) -> Zero:
    zero = read_zero(
        load_recipe("tiny_base", ["deepspeed.config=zero3_bf16"]),
        hidden_size=48,
        ranks=2,
        ranks_per_node=2,
        on_cuda=False,
    )
    return dataclasses.replace(
        zero, **{"persistence_threshold": 0, "prefetch_bucket": 0, "max_reuse_distance": 0, **values}
    )


@pytest.mark.parametrize("recompute_every", [0, 1, 2])
def test_without_prefetch_and_reuse_only_the_running_modules_weights_are_gathered(
    recompute_every: int,
) -> None:
    modules = modules_of(shapes(), None)
    for held in gathered(modules, recompute_every, zero_with(), 2):
        own = sum(parameter.share(2) * 2 for parameter in held.visit.module.parameters)
        first_of_recomputed = own if not held.visit.fetches else 0
        assert held.most in (own, own + first_of_recomputed) or held.visit.during == "recomputed"
        assert held.fetched in (own, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_within_the_reuse_distance_all_weights_stay_from_the_forward_pass_to_their_backward_pass(
    tied: bool,
) -> None:
    modules = modules_of(shapes(tied=tied), None)
    held = gathered(modules, 0, zero_with(max_reuse_distance=10**9), 2)
    everything = sum(parameter.share(2) * 2 for parameter in parameters_of(modules))
    assert held[len(modules) - 1].running == everything
    assert sum(point.fetched for point in held) == everything
    assert held[-1].running == parameters_of(modules)[0].elements


def test_one_rank_gathers_nothing() -> None:
    held = gathered(modules_of(shapes(), None), 1, zero_with(prefetch_bucket=10**6), 1)
    assert {point.most for point in held} == {0}


def test_prefetching_gathers_no_weight_twice_and_goes_past_the_bucket_by_one_weight_at_most() -> None:
    modules = modules_of(shapes(), None)
    largest = max(parameter.elements for parameter in parameters_of(modules))
    zero = zero_with(prefetch_bucket=5000)
    forward = gathered(modules, 0, zero, 2)[: len(modules)]
    assert sum(point.fetched for point in forward) >= sum(p.elements for p in parameters_of(modules))
    for point in forward:
        own = sum(parameter.elements for parameter in point.visit.module.parameters)
        assert point.fetched <= own + 5000 + largest + 2


def test_every_weight_is_in_one_collective_and_a_larger_bucket_needs_fewer() -> None:
    modules = modules_of(shapes(), None)

    def collectives(prefetch: int) -> int:
        return sum(held.collectives for held in gathered(modules, 0, zero_with(prefetch_bucket=prefetch), 2))

    # Without prefetching each module with weights gathers them by itself, forward and backward.
    own = sum(bool(module.parameters) for module in modules)
    assert collectives(0) == 2 * own
    everything = sum(parameter.elements for parameter in parameters_of(modules))
    assert collectives(everything) < collectives(everything // 8) < collectives(0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bucket_holds_what_fits_and_reduces_every_gradient_once(stage: int) -> None:
    draw = random.Random(stage)
    for _ in range(50):
        sizes = [draw.randint(1, 400) for _ in range(draw.randint(1, 30))]
        parameters = [Parameter(name=str(i), elements=size, trained=True) for i, size in enumerate(sizes)]
        zero = dataclasses.replace(zero_with(reduce_bucket=300), stage=stage)
        bucket = Bucket(zero, 2, 2, parameters, over_gloo=False)
        reduced = 0
        for parameter in reversed(parameters):
            before = list(bucket.waiting)
            there = bucket.add(parameter)
            assert bucket.waiting[-1] is parameter
            is_too_much = sum(p.elements for p in (*before, parameter)) > 300
            assert bucket.waiting == ([parameter] if is_too_much else [*before, parameter])
            if is_too_much:
                reduced += sum(p.elements for p in before)
            else:
                assert not there.copies
            waiting_outside = sum(2 * p.elements for p in before if p.elements > 300)
            assert there.whole == waiting_outside + 2 * parameter.elements
            # fp32 for every waiting element at least, and at most twice in fp32 and once in the model's type
            assert there.copies <= 10 * (sum(p.elements for p in before) + 2 * len(before))
        reduced += sum(p.elements for p in bucket.waiting)
        assert reduced == sum(sizes)
