"""The average micro-batch that the planner expects is that of a loader."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.batch import PackedBatch
from bico_ds.config.load import load_recipe
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.planner.workload import Texts, micro_batches
from tests.data.loading.loaders import TOKENS, schedule_of
from tests.data.stores import write_store
from tests.planner.test_flops import pairs_in_spans

MASKS = [{"rate": 0.4}, {"rate": [0.2, 0.7]}, {"rate": 0.4, "unit": "span"}]
OBJECTIVES = [
    {"kind": "ntp"},
    *({"kind": "bico", "mask": mask} for mask in MASKS),
    {"kind": "abi", "mask": {"rate": 0.4}},
]


def measured(batch: PackedBatch) -> dict[str, float]:
    """The counts of a real micro-batch, by their names in `MicroBatch`."""
    return {
        "documents": batch.plan.num_documents,
        "tokens": batch.represented_tokens,
        "kept_rows": batch.plan.num_kept,
        "live_rows": batch.plan.num_live,
        "pairs": batch.plan.num_pairs,
        "head_rows": len(batch.targets),
        "span_pairs": pairs_in_spans(batch.plan),
    }


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_texts_that_an_objective_makes_too_long_for_a_bin_count_as_the_loader_cuts_them(tmp_path, overlong):
    lengths = np.random.default_rng().integers(2, 200, 6_000)
    store = write_store(tmp_path / "store", lengths.tolist())
    recipe = load_recipe(
        "tiny_ntp",
        [
            f"data.sources=[{{store: {store.path}}}]",
            "data.capacity=256",
            f"data.overlong={overlong}",
            "objectives=[{kind: masked_ft}]",
            "training.micro_batch_bins=2",
            "training.global_batch_bins=16",
        ],
    )
    (batch,) = micro_batches(recipe, Texts(lengths=lengths, tokens=int(lengths.sum()), source="test"))
    loader = ElasticLoader(
        StreamSpec(
            stores=[store],
            data=recipe.data,
            schedule=schedule_of(recipe.objectives),
            seed=1,
            global_batch_bins=recipe.training.global_batch_bins,
            vocabulary=TOKENS.vocabulary,
        ),
        RankShare(micro_batch_bins=2),
    )
    found = [
        measured(packed) for step in range(loader.total_steps(1) - 1) for packed in loader.step(step).batches
    ]
    loader.close()
    assert batch.longest <= 256
    for name in ("documents", "tokens", "kept_rows", "pairs", "head_rows"):
        mean = np.mean([counts[name] for counts in found])
        assert getattr(batch, name) == pytest.approx(mean, rel=0.04), name


def test_an_average_micro_batch_is_that_of_the_loader(tmp_path):
    """Within 1 %, the empty ends of bins among it, and 2 % for live rows and their pairs: they are few, and vary most."""
    rng = np.random.default_rng()
    lengths = rng.integers(2, 60, 60_000)
    store = write_store(tmp_path / "store", lengths.tolist())
    recipe = load_recipe(
        "tiny_ntp",
        [
            f"data.sources=[{{store: {store.path}}}]",
            "data.capacity=512",
            f"objectives={json.dumps([{**o, 'probability': 0.2} for o in OBJECTIVES])}",
            "training.micro_batch_bins=2",
            "training.global_batch_bins=16",
        ],
    )
    batches = micro_batches(recipe, Texts(lengths=lengths, tokens=int(lengths.sum()), source="test"))
    assert [batch.objective for batch in batches] == ["ntp", "bico", "bico_2", "bico_3", "abi"]
    assert [batch.mode for batch in batches] == ["causal", *["bidirectional"] * 4]
    for spec, batch in zip(recipe.objectives, batches, strict=True):
        stream = StreamSpec(
            stores=[store],
            data=recipe.data,
            schedule=schedule_of([spec.model_copy(update={"probability": 1.0})]),
            seed=int(rng.integers(2**31)),
            global_batch_bins=recipe.training.global_batch_bins,
            vocabulary=TOKENS.vocabulary,
        )
        loader = ElasticLoader(stream, RankShare(micro_batch_bins=recipe.training.micro_batch_bins))
        # The last one is of the next epoch, too. It is a small one: bins hold between 9 and 200 documents.
        steps = range(loader.total_steps(1) - 1)
        found = [measured(packed) for step in steps for packed in loader.step(step).batches]
        loader.close()
        for name in found[0]:
            mean, tolerance = (
                np.mean([counts[name] for counts in found]),
                0.02 if name in ("live_rows", "span_pairs") else 0.01,
            )
            assert getattr(batch, name) == pytest.approx(mean, rel=tolerance), (batch.objective, name)
