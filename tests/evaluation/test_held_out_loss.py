"""The loss of held-out stores: an independent computation gives the same, whatever the packing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.draws import seed_of_draws
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from bico_ds.documents import Document, Documents
from bico_ds.evaluation.held_out.loss import measure
from bico_ds.evaluation.held_out.stores import HeldOutStore, check_held_out, read_held_out
from bico_ds.evaluation.scoring.share import ONE_PROCESS
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masked import MaskedObjective
from bico_ds.objectives.masks import TokenGrid
from bico_ds.training.assembly import facts_folder
from tests.cures import definitions
from tests.cures.comparing import (
    BOS,
    MASK,
    PLACEHOLDER,
    ROLES,
    SHAPE,
    VOCABULARY,
    of_the_definitions,
    tiny_llama,
)
from tests.data.stores import write_store

CAPACITY, CLOSE = 16, 1e-5
KEY = r"evaluation\.tasks\.0 \(held-out store 'mine'\): "
OBJECTIVES = (
    "{kind: bico, probability: 0.25}, {kind: bico, probability: 0.25, mask: {rate: 0.6}}, "
    "{kind: mlm_u, probability: 0.25, predict: same}, {kind: masked_ft, probability: 0.25, mask_id: 4}"
)


@pytest.fixture
def same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a store was made with is the run's tokenizer: these stores were made with none."""
    monkeypatch.setattr(TokenStore, "check_tokenizer", lambda store, tokenizer: None)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[TokenStore, TokenStore]:
    """One that is trained on, and a held-out one, both of drawn documents, some longer than a bin."""
    rng = np.random.default_rng()

    def store(name: str) -> TokenStore:
        lengths = [*rng.integers(1, CAPACITY + 1, 7).tolist(), 2 * CAPACITY + 3, CAPACITY + 1]
        tokens = rng.integers(3, VOCABULARY, sum(lengths))
        return write_store(tmp_path / name, lengths, add_bos=True, tokens=tokens)

    return store("trained"), store("held_out")


def recipe_of(stores: tuple[TokenStore, TokenStore], *overrides: str, task: str = "") -> Recipe:
    held_out = f"{{kind: held_out, name: mine, store: {stores[1].path}{task}}}"
    return load_recipe(
        "tiny_bico",
        [
            f"data.sources=[{{store: {stores[0].path}}}]",
            f"evaluation.tasks=[{held_out}]",
            f"data.capacity={CAPACITY}",
            "data.overlong=split",
            f"objectives=[{OBJECTIVES}]",
            *overrides,
        ],
    )


def opened(recipe: Recipe, stores: tuple[TokenStore, TokenStore]) -> HeldOutStore:
    objectives = build_objectives(recipe.objectives, ROLES)
    (found,) = read_held_out(recipe, None, [stores[0]], objectives, vocabulary=VOCABULARY)  # type: ignore[arg-type]  # same_tokenizer
    return found


def pieces_of(store: TokenStore, longest: int) -> Iterator[Document]:
    """The documents, those that are too long in pieces, each with a BOS of its own."""
    for number in range(len(store)):
        tokens = store.whole(np.array([number])).token_ids.tolist()
        parts = [tokens[:longest]]
        rest = tokens[longest:]
        while rest:
            parts.append([BOS, *rest[: longest - 1]])
            rest = rest[longest - 1 :]
        for piece, part in enumerate(parts):
            yield Document(
                token_ids=np.array(part), source=0, id=number, piece=piece, prompt_length=0, word_starts=None
            )


def rows_of(recipe: Recipe, number: int, document: Document) -> definitions.Rows:
    """By the definition of the recipe's objective of this number; the masks alone are the package's, drawn one by one."""
    objective = build_objectives(recipe.objectives, ROLES)[number]
    assert isinstance(objective, MaskedObjective)
    alone, tokens = Documents.of([document]), document.token_ids.tolist()
    seed = (
        seed_of_draws(0, 1) if objective.name == "bico_2" else 0
    )  # the second of its kind has its own draws
    drawn = objective.policy.draw(alone, TokenGrid.of(alone), BatchKey(seed=seed, epoch=0))
    masked = drawn.tolist()
    if objective.name == "masked_ft":
        return definitions.masked_ft(tokens, masked, mask_id=MASK, instruction=[], separator=[])
    if objective.name == "mlm_u":
        rows = definitions.mlm_u(tokens, masked, PLACEHOLDER, predict="same")
        return replace(rows, weight=float(np.float32(rows.weight)))
    return definitions.bico(tokens, masked, PLACEHOLDER)


def by_the_definitions(recipe: Recipe, store: TokenStore, number: int) -> float:
    """The weighted mean over all documents, dense and in fp64."""
    kind = recipe.objectives[number].kind
    longest = CAPACITY // 2 if kind == "masked_ft" else CAPACITY
    llama = of_the_definitions(tiny_llama("oracle"))
    with torch.no_grad():
        rows = [rows_of(recipe, number, document) for document in pieces_of(store, longest)]
        return float(definitions.batch_loss(llama, rows))


def by_hugging_face(store: TokenStore) -> float:
    """The mean over all tokens after the first of each piece, one piece at a time."""
    ours = tiny_llama("cpu-flash", torch.float32).causal_lm
    shape: dict[str, Any] = {key: value for key, value in SHAPE.items() if key != "model_type"}
    theirs = LlamaForCausalLM(LlamaConfig(**shape))
    theirs.load_state_dict(ours.state_dict())
    total, count = 0.0, 0
    with torch.no_grad():
        for document in pieces_of(store, CAPACITY):
            ids = torch.from_numpy(document.token_ids)[None]
            log_probs = theirs.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
            count += len(ids[0]) - 1
    return total / count


def measured(held_out: HeldOutStore, backend: str = "oracle", dtype: Any = torch.float64) -> dict[str, Any]:
    found = measure(tiny_llama(backend, dtype), [held_out], ONE_PROCESS, None)
    assert found is not None
    return found["mine"]


def test_each_objective_s_loss_is_that_of_its_definition(stores, same_tokenizer):
    recipe = recipe_of(stores)
    found = measured(opened(recipe, stores))
    assert list(found) == ["bico", "bico_2", "mlm_u", "masked_ft", "ntp"]
    for number, name in enumerate(list(found)[:-1]):
        expected = by_the_definitions(recipe, stores[1], number)
        assert found[name]["loss"] == pytest.approx(expected, rel=1e-9), name
    assert len({found[name]["identity"] for name in found}) == 5


def test_ntp_s_loss_is_that_of_hugging_face_s_model_also_where_the_run_has_no_ntp(stores, same_tokenizer):
    found = measured(opened(recipe_of(stores), stores), "cpu-flash", torch.float32)
    assert found["ntp"]["loss"] == pytest.approx(by_hugging_face(stores[1]), abs=CLOSE)


@pytest.mark.parametrize(
    "changed",
    ["data.max_documents_per_bin=1", "training.micro_batch_bins=4", "seed=99"],
)
def test_neither_packing_nor_the_run_s_seed_changes_it(stores, same_tokenizer, changed):
    usual, other = (measured(opened(recipe_of(stores, *given), stores)) for given in ((), (changed,)))
    for name in usual:
        assert other[name]["loss"] == pytest.approx(usual[name]["loss"], rel=1e-12), name
        assert other[name]["targets"] == usual[name]["targets"]
        assert other[name]["identity"] == usual[name]["identity"]


def test_it_is_the_same_at_every_evaluation_and_leaves_the_model_as_it_was(stores, same_tokenizer):
    held_out, model = opened(recipe_of(stores), stores), tiny_llama("oracle")
    model.train()
    first, second = measured(held_out), measured(held_out)
    assert first == second
    assert model.training


def test_a_limit_takes_documents_from_the_whole_store(stores, same_tokenizer):
    limited = opened(recipe_of(stores, task=", limit: 3"), stores)
    documents = {int(d) for d in limited.batches["ntp"].bins.sequences[0].document}
    assert documents == {0, len(stores[1]) // 3, 2 * len(stores[1]) // 3}
    whole = opened(recipe_of(stores), stores).batches["ntp"]
    assert limited.batches["ntp"].identity != whole.identity


def test_a_stop_on_a_rank_gives_no_result(stores, same_tokenizer):
    share = replace(ONE_PROCESS, should_stop=lambda: True)
    assert measure(tiny_llama("oracle"), [opened(recipe_of(stores), stores)], share, None) is None


NTP_ALONE = "objectives=[{kind: ntp}]"
NOTHING_FITS = (
    f"objective 'ntp': '.*' has no document that fits data.capacity .{CAPACITY}, data.overlong drop"
)


@pytest.mark.parametrize(
    ("lengths", "of_store", "overrides", "message"),
    [
        (
            [9, 9],
            {"prompt_lengths": np.zeros(2, np.int64)},
            ["objectives=[{kind: bico, mask: {eligible: completion}}]"],
            r"objective 'bico': objectives.0..mask.eligible is 'completion'",
        ),
        ([1, 1], {}, [NTP_ALONE], "objective 'ntp': nothing in '.*' is predicted"),
        ([CAPACITY + 1], {}, [NTP_ALONE, "data.overlong=drop"], NOTHING_FITS),
        ([9], {"add_bos": False}, [], "the texts of '.*' do not begin with BOS"),
        ([9], {"token": VOCABULARY}, [], f"'.*' has the token id {VOCABULARY}"),
    ],
)
def test_a_store_without_a_loss_is_refused_by_its_key(
    stores, same_tokenizer, tmp_path, lengths, of_store, overrides, message
):
    of_store = {"add_bos": True, **of_store}
    tokens = np.full(sum(lengths), of_store.pop("token", 7))
    pair = (stores[0], write_store(tmp_path / "other", lengths, tokens=tokens, **of_store))
    recipe = recipe_of(pair, *overrides)
    with pytest.raises(UserError, match=KEY + message):
        opened(recipe, pair)


def test_a_store_that_is_trained_on_is_refused_by_its_path_and_a_copy_by_its_content(
    stores, same_tokenizer, tmp_path
):
    with pytest.raises(UserError, match=f"{KEY}'.*' holds what is trained on"):
        check_held_out(recipe_of((stores[0], stores[0])), verify="structure")
    shutil.copytree(stores[0].path, tmp_path / "copy")
    copy = (stores[0], TokenStore.open(tmp_path / "copy"))
    check_held_out(recipe_of(copy), verify="structure")
    recipe = recipe_of(copy)
    with pytest.raises(UserError, match=f"{KEY}'.*' holds what is trained on"):
        opened(recipe, copy)


def test_a_store_that_is_not_there_is_refused_by_its_key(stores):
    shutil.rmtree(stores[1].path)
    with pytest.raises(UserError, match=KEY):
        check_held_out(recipe_of(stores), verify="structure")


def test_a_store_of_another_tokenizer_is_refused(stores, tmp_path):
    recipe = recipe_of(stores)
    objectives = build_objectives(recipe.objectives, ROLES)
    data = load_recipe("tiny_bico", [f"data.cache_dir={tmp_path}"]).data
    tokenizer = load_tokenizer(facts_folder(data) / "tokenizer")
    with pytest.raises(UserError, match=f"{KEY}.*tokenizer"):
        read_held_out(recipe, tokenizer, [stores[0]], objectives, vocabulary=VOCABULARY)
