"""Bytes between ranks by the definitions of the collectives, and which links they cross."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import Architecture, read_architecture
from bico_ds.planner.communication import (
    Transfer,
    gather_all_weights,
    gathered_elements,
    transfers,
)
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.report.text import warnings
from bico_ds.planner.step_time import StepTime
from bico_ds.planner.workload import assumed_texts
from bico_ds.planner.zero.modules import modules_of, parameters_of

H100 = DEVICES["h100-80g"]
ADAPTERS = "model.lora={rank: 16, alpha: 32}"


def planned(
    name: str, *overrides: str, nodes: int = 1, per_node: int = 8
) -> tuple[Recipe, Architecture, Deployment, dict[str, Transfer]]:
    recipe = load_recipe(name, overrides)
    architecture = read_architecture(recipe.model)
    zero = read_zero(
        recipe,
        hidden_size=architecture.hidden,
        ranks=nodes * per_node,
        ranks_per_node=per_node,
        on_cuda=True,
    )
    deployment = Deployment(device=H100, nodes=nodes, ranks_per_node=per_node, zero=zero)
    found = transfers(recipe, architecture, deployment)
    return recipe, architecture, deployment, {transfer.name: transfer for transfer in found}


@pytest.mark.parametrize("adapters", [(), (ADAPTERS,)], ids=["all weights", "adapters"])
@pytest.mark.parametrize("name", ["llama3_8b_bico", "llama70b_bico"])
def test_the_weights_that_are_gathered_are_those_of_the_architecture(name, adapters):
    recipe, architecture, *_ = planned(name, *adapters)
    weights = parameters_of(modules_of(architecture, recipe.model.lora))
    added = 0 if recipe.model.lora is None else architecture.adapter_parameters(recipe.model.lora)
    assert sum(weight.elements for weight in weights) == architecture.parameters + added
    assert sum(w.elements for w in weights if w.trained) == architecture.trained_parameters(recipe.model.lora)


def test_frozen_weights_send_no_gradient_and_zero_2_gathers_only_what_was_trained():
    for config, kind in (
        ("zero3_bf16", "gradients, reduce-scattered"),
        ("zero2_bf16", "gradients, all-reduced"),
    ):
        recipe, architecture, _, sent = planned("llama3_8b_bico", ADAPTERS, f"deepspeed.config={config}")
        trained = architecture.trained_parameters(recipe.model.lora)
        times = 2 if kind.endswith("all-reduced") else 1
        # Two micro-batches per rank, in fp32.
        assert sent[kind].bytes == pytest.approx(times * 2 * 4 * trained * 7 / 8)
    assert sent["updated weights, gathered"].bytes == pytest.approx(2 * trained * 7 / 8)
    assert len(sent) == 2


def test_what_every_pass_reads_again_is_gathered_again_but_for_what_may_stay():
    """By hand: forward and backward read all weights; what is there at the turn need not come twice."""
    recipe, architecture, deployment, _ = planned("llama70b_bico", nodes=8)
    zero = deployment.zero
    most = 2 * architecture.parameters
    assert (
        most - 2 * zero.max_live_parameters < gathered_elements(architecture, recipe.model, zero, 64) < most
    )
    everything = replace(zero, max_live_parameters=10**12, max_reuse_distance=10**12)
    small = sum(
        w.elements
        for w in parameters_of(modules_of(architecture, recipe.model.lora))
        if w.elements <= zero.persistence_threshold
    )
    assert gathered_elements(architecture, recipe.model, everything, 64) == architecture.parameters - small


def test_adapters_with_checkpointing_gather_three_times():
    """DeepSpeed drops the frozen weights that a recomputation gathered, before the backward pass reads them."""
    recipe, architecture, deployment, _ = planned("llama70b_bico_lora")
    assert gathered_elements(architecture, recipe.model, deployment.zero, 64) == pytest.approx(
        3 * architecture.parameters, rel=0.03
    )
    full = planned("llama70b_bico_lora", "model.lora=null")
    assert gathered_elements(full[1], full[0].model, full[2].zero, 64) < 2 * architecture.parameters


def test_hpz_crosses_nodes_once_per_step_and_with_frozen_weights_not_at_all():
    _, architecture, _, plain = planned("llama70b_bico", nodes=8)
    *_, hpz = planned("llama70b_bico", "deepspeed.config=zero3_hpz", nodes=8)
    small = hpz["small weights, gathered after the step"].bytes * 64 / 63 / 2
    across, inside = hpz["weights, gathered"].bytes, hpz["weights, gathered from the hpZ group"].bytes
    assert across == pytest.approx(2 * (architecture.parameters - small) * 63 / 64, rel=1e-6)
    assert across * 64 / 63 + inside * 8 / 7 == pytest.approx(plain["weights, gathered"].bytes * 64 / 63)
    *_, frozen = planned("llama70b_bico", ADAPTERS, "deepspeed.config=zero3_hpz", nodes=8)
    assert frozen["weights, gathered"].bytes < 0.01 * frozen["weights, gathered from the hpZ group"].bytes


def test_the_slower_link_decides_and_a_node_s_ranks_share_what_crosses_its_border():
    recipe, architecture, deployment, _ = planned("llama70b_bico", nodes=8)
    size = 2 * architecture.parameters * 63 / 64
    seconds = gather_all_weights(recipe.model, architecture, deployment).seconds
    assert seconds.low > size / 8 / H100.network_bandwidth > size / H100.link_bandwidth
    slow = replace(deployment, device=replace(H100, network_bandwidth=H100.network_bandwidth / 10))
    assert gather_all_weights(recipe.model, architecture, slow).seconds.low > 9 * (
        size / 8 / H100.network_bandwidth
    )
    one_node = replace(deployment, nodes=1)
    inside = gather_all_weights(recipe.model, architecture, one_node).seconds
    assert size / H100.link_bandwidth * 0.8 < inside.low < seconds.low


def test_one_rank_sends_nothing():
    *_, sent = planned("llama3_8b_bico", per_node=1)
    assert sent == {}


def test_offload_copies_gradients_of_every_micro_batch_and_weights_once():
    _, architecture, _, sent = planned("llama70b_bico_offload", "training.global_batch_bins=32")
    part = architecture.parameters / 8
    assert (
        sent["gradients, between device and host"].bytes == 2 * 4 * part * 4
    )  # four micro-batches, there and back, fp32
    assert sent["updated weights, from the host"].bytes == 2 * part


def step_of(*overrides: str, nodes: int = 8, bins: int = 128) -> tuple[Plan, StepTime]:
    batch = f"training.global_batch_bins={bins}"
    recipe = load_recipe("llama3_8b_bico", [batch, *overrides])
    plan = make_plan(recipe, H100, nodes=nodes, ranks_per_node=8, texts=assumed_texts(recipe))
    return plan, plan.steps[0]


IN_BF16 = "deepspeed.overrides.communication_data_type=bf16"


def test_gradients_in_bf16_halve_their_bytes_and_are_named_where_nodes_wait_for_each_other():
    (plan, fp32), (in_bf16, bf16) = step_of(), step_of(IN_BF16)
    for one, other in zip(fp32.transfers, bf16.transfers, strict=True):
        assert other.bytes == pytest.approx(one.bytes * (0.5 if one.reduces else 1.0))
    assert bf16.seconds.high < fp32.seconds.high
    assert any(IN_BF16 in line for line in warnings(plan))
    # Not where it is in use, a node is alone, a step computes for long, or a ring of so many ranks would lose too much.
    for no_better in (
        in_bf16,
        step_of(nodes=1)[0],
        step_of("training.micro_batch_bins=8", bins=512)[0],
        step_of(nodes=32, bins=256)[0],
    ):
        assert not any(IN_BF16 in line for line in warnings(no_better))


@pytest.mark.parametrize("nodes", [1, 8])
def test_without_overlap_reductions_come_after_the_computation_and_nothing_is_kept_for_a_second_stream(nodes):
    (plan, beside), (alone, after) = (
        step_of(nodes=nodes),
        step_of("deepspeed.config=zero3_no_overlap", nodes=nodes),
    )
    computed = (after.products + after.elementwise).low
    reduced = sum(t.seconds.low for t in after.transfers if t.reduces)
    gathered = sum(t.seconds.low for t in after.transfers if not t.reduces)
    assert after.seconds.low == pytest.approx(max(computed, gathered) + reduced + after.optimizer.low)
    assert beside.seconds.low == pytest.approx(max(computed, gathered + reduced) + beside.optimizer.low)
    assert after.seconds.high == beside.seconds.high
    for planned_memory, is_kept in ((plan.memory, True), (alone.memory, False)):
        names = {item.name for moment in planned_memory.moments for item in moment.items}
        assert ("kept for a second stream" in names) == is_kept
    assert alone.memory.peak.bytes.low == plan.memory.peak.bytes.low
    assert alone.memory.peak.bytes.high < plan.memory.peak.bytes.high
