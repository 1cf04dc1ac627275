"""The texts that a plan expects are those that the loader packs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import RankShare
from bico_ds.data.planned_texts import texts_of
from bico_ds.planner.workload import micro_batches, steps_of_run
from bico_ds.training import assembly


def loaded(recipe: Recipe) -> tuple[np.ndarray, int]:
    """Lengths of the sequences of the loader's first epoch, and its steps."""
    inputs = assembly.open_inputs(recipe, weights_needed=False)
    loader = assembly.build_loader(recipe, inputs, RankShare())
    try:
        return loader.drawn(0).lengths, assembly.total_steps(recipe, loader)
    finally:
        loader.close()


@pytest.mark.parametrize("most", [1, 3])
def test_bins_that_a_number_of_texts_does_not_fill_hold_average_texts_and_at_most_longest_ones(
    tmp_path, most
):
    recipe = load_recipe(
        "tiny_base",
        [
            f"data.cache_dir={tmp_path}",
            f"data.max_documents_per_bin={most}",
            "training={epochs: 10, global_batch_bins: 4, micro_batch_bins: 2}",
        ],
    )
    texts, (lengths, steps) = texts_of(recipe), loaded(recipe)
    assert steps_of_run(recipe, texts, micro_batches(recipe, texts)) == pytest.approx(steps, abs=1)
    assert micro_batches(recipe, texts)[0].tokens == pytest.approx(2 * most * lengths.mean())
    assert micro_batches(recipe, texts, fullest=True)[0].tokens == 2 * most * lengths.max()


@pytest.mark.parametrize("kind", ["all", "both_orders", "both_orders, derive: other_order"])
def test_embedded_facts_are_counted_exactly_where_the_model_has_their_tokenizer(tmp_path, kind):
    recipe = load_recipe(
        "tiny_base",
        [
            f"data.cache_dir={tmp_path}",
            f"data.sources=[{{facts: {kind}, add_eos: false}}]",
            "data.facts={variants: 7, name_first: 9, description_first: 30, both: 61, seed: 3}",
            "training={epochs: 40, global_batch_bins: 4, micro_batch_bins: 2}",
        ],
    )
    texts, (lengths, steps) = texts_of(recipe), loaded(recipe)
    assert sorted(texts.lengths) == sorted(lengths)
    assert texts.tokens == lengths.sum()
    assert steps_of_run(recipe, texts, micro_batches(recipe, texts)) == pytest.approx(steps, rel=0.02)


def test_stores_are_read_cut_and_mixed_as_the_loader_does_it(tmp_path):
    rng = np.random.default_rng()
    for name, count in (("short", 40), ("long", 25)):
        rows = [{"text": "a " * int(rng.integers(3, 90 if name == "long" else 20))} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"files: [{tmp_path}/{name}.jsonl]" for name in ("short", "long")]
    common = [f"data.cache_dir={tmp_path}/cache", "data.capacity=32", "data.overlong=truncate"]
    facts = assembly.facts_folder(load_recipe("tiny_base", common).data)
    common += [f"model.tokenizer={facts}/tokenizer"]
    made = load_recipe("tiny_base", [*common, f"data.sources=[{{{files[0]}}}, {{{files[1]}}}]"])
    assert "assumed" in texts_of(made).source, "files are not read before they are prepared"
    short, long = assembly.prepare_stores(made, progress=False)
    mixed = f"data.sources=[{{store: {short}, epochs: 2.5}}, {{store: {long}, epochs: 0.4}}]"
    recipe = load_recipe("tiny_base", [*common, mixed])
    assert sorted(texts_of(recipe).lengths) == sorted(loaded(recipe)[0])
    with pytest.raises(UserError, match="no document that fits"):
        texts_of(load_recipe("tiny_base", [*common, mixed, "data.capacity=2", "data.overlong=drop"]))


def test_a_real_tokenizer_s_tokens_are_estimated_from_what_was_measured():
    """The recipe's comment: 542 updates by SmolLM2's tokenizer."""
    recipe = load_recipe("llama70b_bico")
    texts = texts_of(recipe)
    assert steps_of_run(recipe, texts, micro_batches(recipe, texts)) == pytest.approx(542, rel=0.01)
