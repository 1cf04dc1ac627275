"""Host memory, NVMe and disk: DeepSpeed's own functions and torch's rounding are the oracles, where they can be called."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import LoraSpec, ModelSpec
from bico_ds.model.architecture import meta_model, model_config
from bico_ds.model.families import FAMILIES
from bico_ds.model.lora import add_lora
from bico_ds.planner.architecture import Architecture, architecture_of, read_architecture
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.items import Item, total
from bico_ds.planner.storage import checkpoint_bytes, disk, host_memory, nvme
from tests.planner.test_architecture import random_config

DEVICE = DEVICES["h100-80g"]
MIB = 2**20


def planned(
    name: str, *overrides: str, nodes: int = 1, ranks: int = 8
) -> tuple[Recipe, Architecture, Deployment]:
    recipe = load_recipe(name, list(overrides))
    architecture = read_architecture(recipe.model)
    zero = read_zero(
        recipe, hidden_size=architecture.hidden, ranks=nodes * ranks, ranks_per_node=ranks, on_cuda=True
    )
    return recipe, architecture, Deployment(device=DEVICE, nodes=nodes, ranks_per_node=ranks, zero=zero)


def by_name(items: tuple[Item, ...]) -> dict[str, Item]:
    return {item.name: item for item in items}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LoraSpec(rank=3), LoraSpec(rank=2, targets=["down_proj", "k_proj"])])
def test_the_trained_tensors_are_the_model_s_in_its_order(family, lora):
    for seed in range(3):
        spec = ModelSpec(config=random_config(family, np.random.default_rng(seed)), lora=lora)
        model = meta_model(model_config(spec))
        if lora is not None:
            add_lora(model, lora)
        expected = tuple(p.numel() for p in model.parameters() if p.requires_grad)
        assert read_architecture(spec).trained_sizes(lora) == expected
        of_config = architecture_of(model_config(spec).to_dict(), source="the model")
        assert of_config.trained_sizes(lora) == expected


def sub_groups_of_deepspeed(partitions: list[int], least: int) -> list[int]:
    parameters = [SimpleNamespace(partition_numel=lambda size=size: size) for size in partitions]
    groups = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(
        SimpleNamespace(sub_group_size=least), parameters
    )
    return [sum(parameter.partition_numel() for parameter in group) for group in groups]


@pytest.mark.parametrize("config", ["zero3_offload_cpu", "zero3_offload_nvme"])
@pytest.mark.parametrize("least", [100_000_000, 3_000_000, 10**12])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_offloaded_states_are_those_of_deepspeed_s_sub_groups(config, least, ranks):
    recipe, architecture, deployment = planned(
        "llama3_8b_bico", f"deepspeed.config={config}",
        f"deepspeed.overrides.zero_optimization.sub_group_size={least}", ranks=ranks,
    )  # fmt: skip
    partitions = [-(-size // ranks) for size in architecture.trained_sizes(None)]
    groups = np.array(sub_groups_of_deepspeed(partitions, least))
    swapper = SimpleNamespace(numel_alignment=256, min_aio_bytes=MIB, swap_element_size=4)
    aligned = np.array([OptimizerSwapper._io_aligned_numel(swapper, int(size)) for size in groups])
    goes = np.array([OptimizerSwapper.is_swappable_tensor(swapper, numel=int(size)) for size in groups])
    if config == "zero3_offload_cpu":
        goes[:] = False
    items, on_nvme = host_memory(recipe, architecture, deployment), nvme(recipe, architecture, deployment)
    host, kept = by_name(items), groups[~goes]
    expected = {
        "master weights and moments": ranks * 12 * kept.sum(),
        "gradients, one flat buffer": ranks * 4 * sum(partitions),
        "gradients, for the optimizer": ranks * 4 * kept.sum(),
        "buffers for NVMe": ranks * 4 * 4 * aligned.max() if goes.any() else 0,
    }
    assert {name: host[name].bytes.low if name in host else 0 for name in expected} == expected
    rounded = 4 * 2.0 ** np.ceil(np.log2(kept.astype(float)))
    if kept.size:
        assert host["gradients, for the optimizer"].bytes.high == ranks * rounded.sum()
    large = [size for size in partitions if 4 * size >= MIB]
    assert total(on_nvme).low == (ranks * (12 * aligned[goes].sum() + 4 * sum(large)) if goes.any() else 0)


def test_without_pinned_memory_nothing_is_rounded():
    unpinned = "deepspeed.overrides.zero_optimization.offload_optimizer.pin_memory=false"
    pinned, plain = (by_name(host_memory(*planned("llama70b_bico_offload", *o))) for o in ((), (unpinned,)))
    for name in ("gradients, one flat buffer", "gradients, for the optimizer"):
        assert plain[name].bytes.low == plain[name].bytes.high == pinned[name].bytes.low
        assert pinned[name].bytes.high > 1.2 * pinned[name].bytes.low


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("lora", [None, 16])
@pytest.mark.parametrize("config", ["zero2_bf16", "zero3_bf16"])
def test_a_checkpoint_holds_the_optimizer_s_state_and_below_zero_3_the_weights(config, lora, dtype):
    lora = "null" if lora is None else f"{{rank: {lora}}}"
    recipe, architecture, deployment = planned(
        "llama3_8b_bico", f"deepspeed.config={config}", f"model.lora={lora}", f"model.dtype={dtype}"
    )
    weight = 0 if config == "zero3_bf16" else {"bf16": 2, "fp32": 4}[dtype]
    expected = (12 + weight) * architecture.trained_parameters(recipe.model.lora)
    assert checkpoint_bytes(recipe, architecture, deployment.zero) == expected


@pytest.mark.parametrize(
    ("overrides", "kept", "written"),
    [
        (("checkpoint.every_steps=null",), (1, 1), (0, 1)),
        ((), (2, 2), (1, 1)),
        (("training.steps=1000", "training.epochs=null"), (2, 2), (1, 1)),
        (("training.steps=150", "training.epochs=null", "checkpoint.keep_last=5"), (2, 2), (1, 1)),
        (("training.steps=1000", "training.epochs=null", "checkpoint.keep_every_steps=250"), (2, 4), (1, 1)),
    ],
)
def test_the_disk_holds_the_kept_checkpoints_one_more_and_the_export(overrides, kept, written):
    recipe, architecture, deployment = planned("llama70b_bico", *overrides, nodes=8)
    items = by_name(disk(recipe, architecture, deployment.zero, recipe.training.steps))
    one = checkpoint_bytes(recipe, architecture, deployment.zero)
    assert one == 12 * architecture.parameters
    for name, count in (("checkpoints", kept), ("checkpoint being written", written)):
        assert (items[name].bytes.low, items[name].bytes.high) == (count[0] * one, count[1] * one)
    assert items["export"].bytes.low == 2 * architecture.parameters
    kept_here, *_ = planned("llama70b_bico", *overrides, "checkpoint.export=false", nodes=8)
    assert "export" not in by_name(disk(kept_here, architecture, deployment.zero, None))


@pytest.mark.parametrize("every", ["null", "100"])
def test_the_best_checkpoint_takes_one_more_and_evaluations_write_some_of_their_own(every):
    keep = (
        "checkpoint.keep_best={metric: d2n/headline, mode: max}", "evaluation.tasks=[d2n]", "evaluation.every_steps=5",
        f"checkpoint.every_steps={every}", "checkpoint.keep_last=3",
    )  # fmt: skip
    recipe, architecture, deployment = planned("llama70b_bico", *keep, nodes=8)
    items = by_name(disk(recipe, architecture, deployment.zero, 1000))
    one = checkpoint_bytes(recipe, architecture, deployment.zero)
    assert (items["best checkpoint"].bytes.low, items["best checkpoint"].bytes.high) == (0, one)
    assert items["checkpoints"].bytes.high == 3 * one


@pytest.mark.parametrize(
    "name", ["llama70b_bico", "llama70b_bico_lora", "llama70b_bico_offload", "llama3_8b_bico"]
)
def test_more_ranks_per_node_take_no_less_of_a_node_and_bounds_are_in_order(name):
    before = 0.0
    for ranks in (1, 2, 4, 8):
        items = host_memory(*planned(name, nodes=8 // ranks, ranks=ranks))
        assert all(0 <= item.bytes.low <= item.bytes.high for item in items)
        assert total(items).low >= before
        before = total(items).low
