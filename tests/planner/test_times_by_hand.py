"""Seconds and counts of a plan, each from its definition: what shares a link, what is read twice, what is rounded up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import Texts

H100, GB = DEVICES["h100-80g"], 1e9


def planned(*overrides: str, nodes: int = 2, per_node: int = 8, tokens: int = 10**6) -> Plan:
    texts = Texts(lengths=np.full(1, 64), tokens=tokens, source="given")
    recipe = load_recipe("llama3_8b_bico", ["model.config.num_hidden_layers=3", *overrides])
    return make_plan(
        recipe, H100, nodes=nodes, ranks_per_node=per_node, texts=texts, disk_bandwidth=Range(2 * GB, 5 * GB)
    )


def seconds_of(plan: Plan, name: str) -> Range:
    return next(event.seconds for event in plan.run.events if event.name == name)


def test_the_ranks_of_a_node_share_what_crosses_its_border_and_a_ring_has_a_hop_per_rank():
    plan = planned()
    sent = next(t for t in plan.steps[0].transfers if t.name == "gradients, reduce-scattered")
    zero, parameters = plan.deployment.zero, plan.architecture.parameters
    assert sent.bytes == pytest.approx(4 * parameters * 15 / 16)
    best, hops = sent.bytes / 8 / H100.network_bandwidth, parameters / zero.reduce_bucket * 15
    assert sent.seconds.low == pytest.approx(best / 0.9 + hops * 2e-6)
    assert sent.seconds.high == pytest.approx(best / 0.5 + hops * 10e-6)


def test_nvme_is_read_and_written_16_bytes_per_parameter():
    plan = planned("deepspeed.config=zero3_offload_nvme")
    moved = next(t for t in plan.steps[0].transfers if "NVMe" in t.name)
    assert moved.bytes == pytest.approx(2 * 16 * plan.architecture.parameters / 16)


def test_a_checkpoint_is_written_and_at_the_slowest_read_again():
    plan = planned()
    size = 12 * plan.architecture.parameters
    assert seconds_of(plan, "checkpoint").low == pytest.approx(size / (5 * GB))
    assert seconds_of(plan, "checkpoint").high == pytest.approx(2 * size / (2 * GB))


def test_the_mean_step_has_the_objectives_at_their_probabilities():
    shares = "objectives=[{kind: ntp, probability: 0.1}, {kind: bico, probability: 0.9}]"
    plan = planned(shares, nodes=1, per_node=1)
    ntp, bico = (step.seconds for step in plan.steps)
    assert ntp.low != bico.low
    assert plan.run.mean_step_seconds.low == pytest.approx(0.1 * ntp.low + 0.9 * bico.low)
    assert plan.run.mean_step_seconds.high == pytest.approx(0.1 * ntp.high + 0.9 * bico.high)


def test_a_pass_of_an_evaluation_reads_the_weights_and_waits_for_each_layer():
    tasks = ["evaluation.limit=7", "evaluation.tasks=[n2d]", "evaluation.max_new_tokens=10"]
    plan = planned(*tasks, "evaluation.likelihood_others=null", "deepspeed.config=zero2_bf16")
    read = 2 * plan.architecture.parameters / H100.memory_bandwidth
    assert seconds_of(plan, "evaluation").low == pytest.approx(10 * (read / 0.9 + 3 * 0.3e-3))
    assert seconds_of(plan, "evaluation").high == pytest.approx(10 * (read / 0.6 + 3 * 1.2e-3))


def test_a_begun_step_is_a_whole_one():
    per_step = 16 * 2048
    for tokens, steps in ((10 * per_step, 10), (10 * per_step + 1, 11)):
        assert planned("training.epochs=1", tokens=tokens).run.steps == steps
    assert planned("training.epochs=3", tokens=per_step + 1).run.steps == math.ceil(3 + 3 / per_step)
