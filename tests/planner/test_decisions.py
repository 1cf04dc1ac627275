"""What a plan suggests is right: planned anew from the words alone, as a user would, it is as promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bico_ds.config.load import load_recipe
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.planner.decisions import (
    find_change,
    largest_item,
    largest_micro_batch,
    over_nodes,
    over_variants,
    suggest,
)
from bico_ds.planner.devices import DEVICES
from bico_ds.planner.plan import Plan, make_plan
from bico_ds.planner.workload import Texts

TEXTS = Texts.of(np.random.default_rng().integers(5, 120, size=500), source="random")
# What suggestions are made of, from the cheapest on, as options for a recipe on one node of 8 GPUs.
CHANGES = (
    ["model.activation_checkpointing=1"],
    ["training.micro_batch_bins=4"],
    ["training.micro_batch_bins=2"],
    ["training.micro_batch_bins=1"],
    ["model.loss_chunk_rows=128"],
    ["deepspeed.config=zero3_bf16"],
)


def planned(*overrides: str, memory: float = 80e9, nodes: int = 1, per_node: int = 8) -> Plan:
    """Eight layers of llama3_8b_bico, 8 bins at once under ZeRO-2, and all that would make it smaller left out."""
    large = ["model.activation_checkpointing=0", "training.micro_batch_bins=8", "deepspeed.config=zero2_bf16"]
    large += [
        "training.global_batch_bins=256",
        "model.config.num_hidden_layers=8",
        "model.config.vocab_size=4096",
    ]
    recipe = load_recipe("llama3_8b_bico", [*large, *overrides])
    device = replace(DEVICES["h100-80g"], memory_bytes=int(memory))
    return make_plan(recipe, device, nodes=nodes, ranks_per_node=per_node, texts=TEXTS)


def as_a_user_gives(words: Sequence[str], memory: float) -> Plan:
    """The plan of the same recipe with these options of `bico-ds plan`."""
    parts = " ".join(words).split()
    given = list(zip(parts[::2], parts[1::2], strict=True))
    last = dict(given)
    return planned(
        *(value for option, value in given if option == "--set"),
        memory=memory,
        nodes=int(last.get("--nodes", 1)),
        per_node=int(last.get("--gpus-per-node", 8)),
    )


def test_the_suggested_change_fits_and_no_cheaper_one_does():
    """On devices from the size of the plan to a third of it; several changes are needed together on the smallest."""
    whole = planned().memory.peak.bytes.high
    kinds = set()
    for share in (0.98, *np.random.default_rng().uniform(0.36, 0.9, size=2), 0.35):
        memory = float(share) * whole
        change = find_change(planned(memory=memory))
        assert change is not None
        kinds.add(change.words)
        assert as_a_user_gives(change.words, memory).memory.fits
        assert change.plan.memory == as_a_user_gives(change.words, memory).memory
        assert suggest(planned(memory=memory)) == f"{' '.join(change.words)} would fit"
        for cheaper in CHANGES:
            words = tuple(f"--set {override}" for override in cheaper)
            if words == change.words:
                break
            assert not planned(*cheaper, memory=memory).memory.fits, cheaper
        for left_out in change.words if len(change.words) > 1 else ():
            rest = [words for words in change.words if words != left_out]
            assert not as_a_user_gives(rest, memory).memory.fits, left_out
    assert len(kinds) > 1, kinds


def test_no_change_is_planned_twice_in_the_search(monkeypatch):
    """A plan of 80 layers takes long enough that a search through many is to be short."""
    plan, changed, asked = planned("deepspeed.config=zero3_bf16", memory=2e9), Plan.changed, []

    def recorded(self, recipe, *, nodes=None, ranks_per_node=None):
        now = self.deployment
        asked.append((recipe, nodes or now.nodes, ranks_per_node or now.ranks_per_node))
        return changed(self, recipe, nodes=nodes, ranks_per_node=ranks_per_node)

    monkeypatch.setattr(Plan, "changed", recorded)
    find_change(plan)
    assert len(asked) > len(CHANGES)
    assert not [one for index, one in enumerate(asked) if one in asked[:index]]


def test_nothing_is_suggested_where_it_fits_or_where_nothing_helps():
    assert find_change(planned(memory=1e15)) is None
    assert suggest(planned(memory=1e15)) is None
    assert suggest(planned(memory=1e6)) is None


def test_the_largest_micro_batch_fits_and_one_bin_more_does_not():
    def fits(bins: int, memory: float) -> bool:
        batch = [f"training.micro_batch_bins={bins}", f"training.global_batch_bins={8 * bins}"]
        return planned(*batch, memory=memory).memory.fits

    for _ in range(3):
        memory = float(np.random.default_rng().uniform(1.05, 3)) * planned().memory.peak.bytes.high
        most = largest_micro_batch(planned(memory=memory))
        assert most >= 8
        assert fits(most, memory) and not fits(most + 1, memory)
    assert largest_micro_batch(planned(memory=1e6)) == 0


def test_node_counts_are_those_over_which_the_batch_divides_and_the_plan_s_own():
    found = over_nodes(planned("training.global_batch_bins=192", "training.micro_batch_bins=1", nodes=3))
    assert [plan.deployment.nodes for plan in found] == [1, 2, 3, 4, 8]
    anew = planned("training.global_batch_bins=192", "training.micro_batch_bins=1", nodes=4)
    assert found[3].memory == anew.memory
    assert found[3].run == anew.run


def test_variants_are_the_files_of_ds_configs_each_planned_as_itself():
    found = over_variants(planned())
    assert list(found) == sorted(file.stem for file in DS_CONFIGS.glob("*.json"))
    for name in ("zero3_bf16", "zero3_offload_cpu"):
        anew = planned(f"deepspeed.config={name}")
        assert (found[name].memory, found[name].host, found[name].run) == (anew.memory, anew.host, anew.run)


@pytest.mark.parametrize("objective", ["ntp", "bico"])
def test_the_largest_item_is_of_the_peak(objective):
    plan = planned(f"objectives=[{{kind: {objective}}}]")
    sizes = [item.bytes.high for item in plan.memory.peak.items]
    assert largest_item(plan).bytes.high == max(sizes)
    assert plan.memory.peak.bytes.high == max(moment.bytes.high for moment in plan.memory.moments)
