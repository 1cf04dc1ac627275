"""The time of a step: its bounds, what grows with what, and that rates follow from seconds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES, Device, cpu_device
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.step_time import StepTime, step_time
from bico_ds.planner.workload import Texts, micro_batches

TEXTS = Texts(lengths=np.random.default_rng().integers(20, 2000, 500), tokens=None, source="drawn")


def step(
    *overrides: str, name: str = "llama70b_ntp", device: Device = DEVICES["h100-80g"], nodes: int = 8
) -> tuple[Recipe, StepTime]:
    recipe = load_recipe(name, overrides)
    architecture = read_architecture(recipe.model)
    zero = read_zero(
        recipe,
        hidden_size=architecture.hidden,
        ranks=8 * nodes,
        ranks_per_node=8,
        on_cuda=device.kind == "cuda",
    )
    deployment = Deployment(device=device, nodes=nodes, ranks_per_node=8, zero=zero)
    (batch,) = micro_batches(recipe, TEXTS)
    return recipe, step_time(recipe, architecture, deployment, batch)


def test_the_bounds_hide_transfers_or_add_them():
    _, found = step()
    sent = [transfer.seconds for transfer in found.transfers]
    computed = found.products + found.elementwise
    assert found.seconds.low == max(computed.low, sum(s.low for s in sent)) + found.optimizer.low
    assert found.seconds.high == pytest.approx(
        computed.high + sum(s.high for s in sent) + found.optimizer.high
    )


@pytest.mark.parametrize(
    "device", [DEVICES["h100-80g"], cpu_device(64 * 2**30, 1e11, 8)], ids=lambda d: d.kind
)
@pytest.mark.parametrize("objective", ["ntp", "bico"])
@pytest.mark.parametrize("more", [(), ("model.lora={}",), ("model.dtype=fp32",)])
def test_the_parts_add_up_to_the_step(device, objective, more):
    overrides = [f"objectives=[{{kind: {objective}}}]", "model.activation_checkpointing=2", *more]
    recipe, found = step(*overrides, name="llama3_8b_bico", device=device, nodes=1)
    assert sum(part.low for part in found.parts.values()) == pytest.approx(found.seconds.low)
    assert sum(part.high for part in found.parts.values()) == pytest.approx(found.seconds.high)
    has_flash = device.kind == "cuda" and recipe.model.dtype == "bf16"
    assert (StepPart.ATTENTION_PASSES in found.parts) == has_flash
    assert (StepPart.ATTENTION_FUSED in found.parts) == (not has_flash)
    assert (StepPart.LIVE_ROWS in found.parts) == (has_flash and objective != "ntp")
    assert found.parts[StepPart.LINEAR_LAYERS].low > found.parts[StepPart.NORMS].low > 0


def test_on_cpus_nothing_is_hidden():
    device = cpu_device(64 * 2**30, 1e11, 8)
    _, found = step("deepspeed.config=zero3_bf16", device=device, nodes=1)
    sent = sum(transfer.seconds.low for transfer in found.transfers)
    assert sent > 0
    computed = found.products.low + found.elementwise.low
    assert found.seconds.low == pytest.approx(computed + sent + found.optimizer.low)


def test_rates_and_mfu_follow_from_the_seconds():
    recipe, found = step()
    tokens = recipe.training.global_batch_bins * recipe.data.capacity / 64
    assert found.represented_per_second.low * found.seconds.high == pytest.approx(tokens)
    assert found.kept_per_second.high * found.seconds.low == pytest.approx(tokens)  # NTP drops no token
    useful = found.flops.useful / 64 / DEVICES["h100-80g"].bf16_flops
    assert found.mfu.high * found.seconds.low == pytest.approx(useful)
    assert 0 < found.mfu.low < found.mfu.high < 0.8


def test_a_larger_global_batch_repeats_what_micro_batches_do_and_updates_once():
    _, once = step()
    _, twice = step("training.global_batch_bins=128")
    assert twice.products.low == pytest.approx(2 * once.products.low)
    assert twice.flops.useful == pytest.approx(2 * once.flops.useful)
    assert once.optimizer.low < twice.optimizer.low < 2 * once.optimizer.low


def test_a_device_twice_as_fast_halves_each_part():
    slow = DEVICES["h100-80g"]
    names = ("bf16_flops", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_bandwidth")
    fast = replace(slow, **{name: 2 * getattr(slow, name) for name in names})
    (_, before), (_, after) = step(device=slow), step(device=fast)
    assert after.products.high == pytest.approx(before.products.high / 2)
    assert after.optimizer.high == pytest.approx(before.optimizer.high / 2)
    assert before.seconds.high / 2 < after.seconds.high < 0.7 * before.seconds.high  # delays stay


def test_an_offloaded_optimizer_takes_longer_by_the_host_s_memory():
    _, device = step(nodes=1)
    _, host = step("deepspeed.config=zero3_offload_cpu", nodes=1)
    assert host.optimizer.low > 2 * device.optimizer.high
    assert host.seconds.low > device.seconds.low
