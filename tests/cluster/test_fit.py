"""A run is refused where the least of its plan is more than the memory that is there, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from bico_ds.cluster.preflight.fit import NodeMemory, by_node, lack_of_memory
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.planner.activations import activation_memory
from bico_ds.planner.items import of_tensors, total
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.workload import assumed_texts

PLENTY = 10**16
SMALL = ("model.config.num_hidden_layers=4", "training.global_batch_bins=8")


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("llama3_8b_bico", [*SMALL, *overrides])


def node(host: str = "n0", *, ranks: int = 4, gpu: int | None = PLENTY, memory: int = PLENTY) -> NodeMemory:
    return NodeMemory(host=host, ranks=ranks, device_bytes=gpu, host_bytes=memory)


def lack(recipe: Recipe, *nodes: NodeMemory, fill: float = 0.0) -> str | None:
    return lack_of_memory(partial(make_plan, recipe, texts=assumed_texts(recipe)), nodes, fill=fill)


def plan_on(recipe: Recipe, on: NodeMemory, *, nodes: int = 1) -> Plan:
    texts = assumed_texts(recipe)
    return make_plan(recipe, on.device(), nodes=nodes, ranks_per_node=on.ranks, texts=texts)


def kept(plan: Plan, objective: str) -> float:
    (batch,) = (batch for batch in plan.batches if batch.objective == objective)
    on_cuda = plan.deployment.device.kind == "cuda"
    items = activation_memory(plan.architecture, plan.recipe.model, batch, on_cuda=on_cuda).kept
    return total(items).low


@pytest.mark.parametrize("fill", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_gpu_one_byte_too_small_for_states_and_kept_activations_is_refused_and_none_else(nodes, fill):
    recipe = recipe_of()
    plan = plan_on(recipe, node(), nodes=nodes)
    least = of_tensors(plan.memory.resident).low + fill * min(kept(plan, "ntp"), kept(plan, "bico"))
    fine = [node(f"n{number}", gpu=int(least) + 1) for number in range(nodes)]
    assert lack(recipe, *fine, fill=fill) is None
    found = lack(recipe, *fine[:-1], node("small", gpu=int(least) - 1), fill=fill)
    assert found is not None and found.startswith("small: a GPU has ")
    assert any(item.name in found for item in plan.memory.resident)


def test_ranks_on_cpus_share_the_host_s_memory():
    recipe = recipe_of("model.dtype=fp32")
    on_cpus = node(ranks=4, gpu=None)
    plan = plan_on(recipe, on_cpus)
    least = 4 * of_tensors(plan.memory.resident).low + of_tensors(plan.host).low
    assert lack(recipe, replace(on_cpus, host_bytes=int(least) + 1)) is None
    found = lack(recipe, replace(on_cpus, host_bytes=int(least) - 1))
    assert found is not None and "n0: the host, swap included, has" in found and "for 4 ranks" in found


@pytest.mark.parametrize("stage", [2, 3])
def test_on_cpus_states_offloaded_to_the_host_count_once(stage):
    zero = "deepspeed.overrides.zero_optimization"
    files = {2: "zero2_bf16", 3: "zero3_offload_cpu"}
    overrides = [f"deepspeed.config={files[stage]}", f"{zero}.offload_optimizer.device=cpu"]
    recipe, on_cpus = recipe_of("model.dtype=fp32", *overrides), node(ranks=2, gpu=None)
    plan = plan_on(recipe, on_cpus)
    # Per parameter 12 of states and 8 of gradients at most, and the weights: divided, or all of them on both ranks.
    most = (20 + (4 if stage == 3 else 8)) * plan.architecture.parameters
    assert lack(recipe, replace(on_cpus, host_bytes=int(most + 2e9))) is None
    assert lack(recipe, replace(on_cpus, host_bytes=int(most / 2))) is not None


def test_offload_to_the_host_needs_its_memory_whatever_the_gpus_have():
    offloaded, plain = recipe_of("deepspeed.config=zero3_offload_cpu"), recipe_of()
    plan = plan_on(offloaded, node())
    least = int(of_tensors(plan.host).low)
    assert 20 * plan.architecture.parameters < least < 21 * plan.architecture.parameters
    assert lack(offloaded, node(memory=least + 1)) is None
    assert lack(plain, node(memory=least - 1)) is None
    found = lack(offloaded, node(memory=least - 1))
    assert found is not None and "master weights and moments" in found and "NVMe" in found


@pytest.mark.parametrize("error", [UserError("no such file"), ZeroDivisionError()])
def test_a_plan_that_cannot_be_made_refuses_nothing(error):
    def fails(*_: object, **__: object) -> Plan:
        raise error

    assert lack_of_memory(fails, [node(gpu=1, memory=1)], fill=1.0) is None


def test_ranks_are_grouped_by_machine_and_the_smallest_gpu_counts():
    ranks = [("a", "1", 80, 1000), ("b", "2", 80, 900), ("a", "1", 79, 1001), ("b", "2", 81, 900)]
    assert by_node(ranks) == [
        node("a", ranks=2, gpu=79, memory=1001),
        node("b", ranks=2, gpu=80, memory=900),
    ]
    assert by_node([("a", "1", None, 5)]) == [node("a", ranks=1, gpu=None, memory=5)]


def test_two_machines_of_one_host_name_are_two_nodes():
    ranks = [("localhost", "1", 80, 900), ("localhost", "2", 80, 900)]
    assert [found.ranks for found in by_node(ranks)] == [1, 1]
