"""What is advised saves what the planner says of the same `--set`, fits, and is not refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bico_ds.config.load import load_recipe
from bico_ds.planner.devices import DEVICES, Device, cpu_device
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.report.advice import LEAST_SAVED, Advice, advise, of_data_wait
from bico_ds.planner.workload import assumed_texts

H200 = DEVICES["h200"]
# Each slow in a way of its own, and how its remedy begins.
SLOW = {
    "layers are recomputed": (
        ("model.activation_checkpointing=1", "training.micro_batch_bins=4"),
        "model.activation_checkpointing=0",
    ),
    "on the host": (("deepspeed.config=zero3_offload_cpu",), "deepspeed.config="),
    "many passes": ((), "training.micro_batch_bins="),
    "few rows of logits": (
        ("model.loss_chunk_rows=8", "training.micro_batch_bins=4"),
        "model.loss_chunk_rows=",
    ),
    "the Triton kernels alone": (
        ("model.attention_backend=triton", "data.capacity=32768", "training.micro_batch_bins=4"),
        "model.attention_backend=auto",
    ),
}


def planned(*overrides: str, device: Device = H200, nodes: int = 1) -> Plan:
    """Of a model with few layers, whose replay takes little time."""
    few = ("model.config.num_hidden_layers=3", "training.global_batch_bins=32", "model.path=null")
    recipe = load_recipe("llama3_8b_bico", [*few, *overrides])
    return make_plan(recipe, device, nodes=nodes, ranks_per_node=8, texts=assumed_texts(recipe))


def advised(plan: Plan) -> dict[str, Advice]:
    return {advice.override: advice for advice in advise(plan, is_allowed=lambda override: True)}


@pytest.mark.parametrize("slow", SLOW)
def test_each_saving_is_what_the_planner_says_of_the_override_given_literally(slow):
    overrides, remedy = SLOW[slow]
    before = planned(*overrides)
    found = advised(before)
    assert any(override.startswith(remedy) for override in found)
    middles = [advice.middle for advice in found.values()]
    assert middles == sorted(middles, reverse=True)
    for override, advice in found.items():
        after = planned(*overrides, override)
        old, new = before.represented_per_second, after.represented_per_second
        ends = sorted([1 - old.high / new.high, 1 - old.low / new.low])
        assert [advice.saves.low, advice.saves.high] == pytest.approx(ends)
        assert LEAST_SAVED <= advice.saves.low <= advice.middle <= advice.saves.high < 1
        assert after.memory.fits


def test_several_nodes_are_advised_to_send_less():
    found = advised(planned("training.micro_batch_bins=1", device=DEVICES["h100-80g"], nodes=4))
    assert {"deepspeed.config=zero3_hpz", "deepspeed.overrides.communication_data_type=bf16"} <= set(found)


def test_what_does_not_fit_is_not_advised():
    slow, _ = SLOW["layers are recomputed"]
    roomy, every = planned(*slow), "model.activation_checkpointing=0"
    needed = planned(*slow, every).memory.peak.bytes.high
    small = replace(H200, memory_bytes=int(0.95 * needed))
    assert every in advised(roomy)
    tight = planned(*slow, device=small)
    assert tight.memory.fits
    found = advised(tight)
    assert every not in found
    assert all(planned(*slow, override, device=small).memory.fits for override in found)


def test_of_what_a_start_would_refuse_the_next_best_is_advised():
    plan = planned()
    best = next(override for override in advised(plan) if "micro_batch" in override)
    found = advise(plan, is_allowed=lambda override: override != best)
    assert best == "training.micro_batch_bins=4"
    assert "training.micro_batch_bins=2" in [advice.override for advice in found]


def test_cpus_are_not_advised_to_offload_to_themselves():
    recipe = load_recipe("tiny_bico")
    plan = make_plan(
        recipe, cpu_device(8 * 2**30, 1e11, 2), nodes=1, ranks_per_node=2, texts=assumed_texts(recipe)
    )
    assert not [override for override in advised(plan) if "offload" in override]


def test_a_wait_for_data_that_is_measured_is_advised_against_from_two_per_cent_on():
    plan = planned("data.workers=3")
    found = of_data_wait(plan, 0.25)
    assert found is not None and (found.override, found.middle, found.saves.high) == (
        "data.workers=6",
        0.25,
        0.25,
    )
    assert of_data_wait(plan, 0.019) is None
