"""`share_by`: the given shares are those of tokens or FLOPs that a run's steps really have."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import tests
from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.compute.shares import StepShares
from bico_ds.planner.flops import useful_flops
from bico_ds.planner.workload import Texts, micro_batches
from tests.data.loading.loaders import TOKENS, schedule_of, state_at
from tests.data.stores import write_store

OBJECTIVES = [
    {"kind": "ntp", "probability": 0.3},
    {"kind": "bico", "probability": 0.2, "mask": {"rate": 0.7}},  # few of whose tokens are rows
    {"kind": "doubling", "probability": 0.5},
]
# What a spec's `cost` does not know: prompts, and how many tokens a text of the recipe has.
OF_PROMPTS = [
    {"kind": "ntp", "probability": 0.25, "loss_on": "completion"},
    {"kind": "bico", "probability": 0.25, "mask": {"rate": 0.4, "eligible": "completion"}},
    {"kind": "mlm_u", "probability": 0.2, "eligible": "completion"},
    {
        "kind": "masked_ft",
        "probability": 0.3,
        "instruction": "each letter of this is a token of it",
        "separator": "|||",
    },
]
STEPS = 400


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    lengths = np.random.default_rng().integers(2, 60, 3000).tolist()
    return write_store(tmp_path_factory.mktemp("stores") / "store", lengths)


def recipe_of(store, share_by: str, objectives=OBJECTIVES, **changes):
    values = {"data.capacity": 256, "training.global_batch_bins": 4, **changes}
    return load_recipe(
        "tiny_ntp",
        [
            f"imports=[{tests.DOUBLING}]",
            f"data.sources=[{{store: {store.path}}}]",
            f"objectives={json.dumps(objectives)}",
            f"share_by={share_by}",
            *(f"{key}={value}" for key, value in values.items()),
        ],
    )


def stream_of(recipe, store, seed: int = 1) -> StreamSpec:
    return StreamSpec(
        stores=[store],
        data=recipe.data,
        schedule=schedule_of(
            recipe.objectives, seed, tokens=replace(TOKENS, encode=lambda text: (9,) * len(text))
        ),
        seed=seed,
        global_batch_bins=recipe.training.global_batch_bins,
        vocabulary=TOKENS.vocabulary,
        shares=StepShares(recipe=recipe),
    )


def loader_of(recipe, store, *, seed: int = 1, state=None, rank: int = 0, size: int = 1) -> ElasticLoader:
    return ElasticLoader(stream_of(recipe, store, seed), RankShare(rank=rank, world_size=size), state=state)


def per_step(loader: ElasticLoader, recipe, share_by: str) -> dict[str, float]:
    """What a step of each objective has on average, of real batches."""
    architecture, found = read_architecture(recipe.model), {spec.kind: [] for spec in recipe.objectives}
    for step in range(STEPS):
        drawn = loader.step(step)
        batches = drawn.batches
        flops = useful_flops(
            architecture,
            recipe.model,
            rows=sum(len(batch.input_ids) for batch in batches),
            targets=sum(len(batch.targets) for batch in batches),
            pairs=sum(batch.plan.num_pairs for batch in batches),
        )
        tokens = sum(batch.represented_tokens for batch in batches)
        found[drawn.objective].append({"steps": 1, "tokens": tokens, "flops": flops}[share_by])
    return {name: float(np.mean(amounts)) for name, amounts in found.items()}


@pytest.mark.parametrize("objectives", [OBJECTIVES, OF_PROMPTS], ids=["all", "of_prompts"])
@pytest.mark.parametrize("share_by", ["tokens", "flops"])
def test_the_recipes_shares_are_those_of_what_is_counted_in_real_steps(store, share_by, objectives):
    recipe = recipe_of(store, share_by, objectives)
    loader = loader_of(recipe, store, seed=int(np.random.default_rng().integers(2**31)))
    amounts = per_step(loader, recipe, share_by)
    parts = {
        name: probability * amounts[name]
        for name, probability in zip(amounts, loader.schedule.probabilities, strict=True)
    }
    total = sum(parts.values())
    shares = [entry["probability"] for entry in objectives]
    for name, share in zip(parts, shares, strict=True):
        assert parts[name] / total == pytest.approx(share, abs=0.01), name


@pytest.mark.parametrize("share_by", ["tokens", "flops"])
def test_the_same_shares_of_steps_are_others(store, share_by):
    steps = loader_of(recipe_of(store, share_by), store).schedule.probabilities
    shares = [entry["probability"] for entry in OBJECTIVES]
    assert max(abs(share - p) for share, p in zip(shares, steps, strict=True)) > 0.03, steps


def test_flops_are_counted_in_a_bin_that_holds_everything(store):
    """More tokens than are counted at once; a step of `doubling` then has twice those of NTP."""
    loader = loader_of(recipe_of(store, "flops", **{"data.capacity": 1 << 20}), store)
    weights = [entry["probability"] for entry in OBJECTIVES]
    ntp, _, doubling = (w / p for w, p in zip(weights, loader.schedule.probabilities, strict=True))
    assert doubling / ntp == pytest.approx(2, rel=0.1)


def test_by_steps_the_schedule_is_the_recipes(store):
    recipe = recipe_of(store, "steps")
    assert loader_of(recipe, store).schedule.probabilities == tuple(
        entry["probability"] for entry in OBJECTIVES
    )


@pytest.mark.parametrize("share_by", ["tokens", "flops"])
def test_steps_are_the_same_on_every_rank_and_after_a_resume(store, share_by):
    recipe = recipe_of(store, share_by)
    whole = loader_of(recipe, store)
    state = state_at(whole, 11)
    # What a later program estimates otherwise does not change a run that goes on.
    state["step_probabilities"] = [0.2, 0.2, 0.6]
    resumed = loader_of(recipe, store, state=state, rank=1, size=2)
    assert resumed.schedule.probabilities == (0.2, 0.2, 0.6)
    state = state_at(whole, 11)
    resumed = loader_of(recipe, store, state=state, rank=1, size=2)
    drawn = [whole.step(step).objective for step in range(11, 60)]
    assert [resumed.step(step).objective for step in range(11, 60)] == drawn
    assert len(set(drawn)) == len(OBJECTIVES)


def test_a_resume_that_shares_by_something_else_is_refused_naming_the_key(store):
    state = state_at(loader_of(recipe_of(store, "tokens"), store), 3)
    with pytest.raises(UserError, match=r"share_by: tokens in the checkpoint, flops now"):
        loader_of(recipe_of(store, "flops"), store, state=state)
    allowed = recipe_of(store, "flops", **{"data.allow_change": "true"})
    fresh = loader_of(recipe_of(store, "flops"), store).schedule.probabilities
    assert loader_of(allowed, store, state=state).schedule.probabilities == fresh


@pytest.mark.parametrize("share_by", ["steps", "tokens", "flops"])
def test_a_plan_has_the_loaders_probabilities(store, share_by):
    recipe = recipe_of(store, share_by)
    texts = Texts(lengths=store.lengths, tokens=int(store.lengths.sum()), source="test")
    planned = StepShares(recipe=recipe).of_steps(micro_batches(recipe, texts))
    loaded = loader_of(recipe, store).schedule.probabilities
    assert [batch.probability for batch in planned] == pytest.approx(loaded, rel=0.02)


def test_a_word_that_nothing_is_shared_by_is_refused_with_those_there_are(store):
    with pytest.raises(UserError, match=r"share_by.*steps.*tokens.*flops.*did you mean 'tokens'"):
        recipe_of(store, "token")
