"""The held-out stores of a recipe, with every mistake found before a model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.objectives.table import numbers_in_kind
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.held_out import HeldOutTaskSpec
from bico_ds.config.sections.keep_best import NTP
from bico_ds.data.store import TokenStore, Verify
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.held_out.batches import FixedBatches, fixed_batches
from bico_ds.objectives.base import Objective
from bico_ds.objectives.ntp import NextTokenPrediction


@dataclass(frozen=True, kw_only=True)
class HeldOutStore:
    """A held-out store of the recipe: its batches by the name of an objective."""

    spec: HeldOutTaskSpec
    batches: dict[str, FixedBatches]


def check_held_out(recipe: Recipe, *, verify: Verify) -> None:
    """Raise `UserError` for stores that cannot be opened, or are trained on, as far as no tokenizer is needed.

    `verify`: as `TokenStore.open` takes it.
    """
    sources = recipe.data.sources
    trained = {source.store.here().resolve() for source in sources if source.store is not None}
    for key, spec in _numbered(recipe):
        _open(spec, key, verify)
        if spec.store.here().resolve() in trained:
            raise _is_trained_on(key, spec)


def read_held_out(
    recipe: Recipe,
    tokenizer: Tokenizer,
    stores: Sequence[TokenStore],
    objectives: Sequence[Objective],
    *,
    vocabulary: int,
) -> list[HeldOutStore]:
    """The recipe's held-out stores as each of its objectives reads them, and NTP.

    `stores`: those that are trained on, as far as they are known. `objectives`: the run's. `vocabulary`: ids that the model
    embeds. Raises `UserError` as `check_held_out` does, for a store of another tokenizer, with the content of one in
    `stores`, whose texts begin with BOS where none in `stores` does or the other way round, and for one of which an
    objective has nothing to predict.
    """
    draws = dict(zip([o.name for o in objectives], numbers_in_kind(recipe.objectives), strict=True))
    by_name = {objective.name: objective for objective in objectives}
    by_name.setdefault(NTP, NextTokenPrediction(spec=NtpSpec(), name=NTP))
    found = []
    for key, spec in _numbered(recipe):
        store = _open(spec, key, "structure")
        _check_store(store, spec, key, tokenizer, stores, vocabulary)
        batches = {}
        for name, objective in by_name.items():
            try:
                batches[name] = _read(recipe, store, spec, objective, draws.get(name, 0), vocabulary)
            except UserError as error:
                raise UserError(f"{key}: objective '{name}': {error}") from error
        found.append(HeldOutStore(spec=spec, batches=batches))
    return found


def _read(
    recipe: Recipe,
    store: TokenStore,
    spec: HeldOutTaskSpec,
    objective: Objective,
    draws: int,
    vocabulary: int,
) -> FixedBatches:
    objective.check(store)
    try:
        batches = fixed_batches(
            store, objective, recipe, limit=spec.limit, draws=draws, vocabulary=vocabulary
        )
    except UserError:
        raise
    except ValueError:
        raise UserError(
            f"'{store.path}' has no document that fits data.capacity ({recipe.data.capacity}, data.overlong "
            f"{recipe.data.overlong}); raise data.capacity, or the task's limit"
        ) from None
    if not any(len(batches.build(number).targets) for number in range(batches.count)):
        raise UserError(
            f"nothing in '{store.path}' is predicted, so there is no loss; give it more or longer documents"
        )
    return batches


def _check_store(
    store: TokenStore,
    spec: HeldOutTaskSpec,
    key: str,
    tokenizer: Tokenizer,
    trained: Sequence[TokenStore],
    vocabulary: int,
) -> None:
    try:
        store.check_tokenizer(tokenizer)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if store.fingerprint in {other.fingerprint for other in trained}:
        raise _is_trained_on(key, spec)
    if trained and store.manifest.add_bos not in {other.manifest.add_bos for other in trained}:
        begins, others = ("begin", "do not") if store.manifest.add_bos else ("do not begin", "do")
        raise UserError(
            f"{key}: the texts of '{store.path}' {begins} with BOS, and those that are trained on {others}: the losses "
            "would not compare; prepare it with the same add_bos"
        )
    if (largest := store.manifest.max_token_id) >= vocabulary:
        raise UserError(
            f"{key}: '{store.path}' has the token id {largest}, and the model knows ids up to {vocabulary - 1}: prepare it "
            f"again with --vocab-size {vocabulary}"
        )


def _open(spec: HeldOutTaskSpec, key: str, verify: Verify) -> TokenStore:
    try:
        return TokenStore.open(spec.store.here(), verify=verify)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _is_trained_on(key: str, spec: HeldOutTaskSpec) -> UserError:
    return UserError(
        f"{key}: '{spec.store}' holds what is trained on, so its loss says nothing of other texts; name the store that "
        "`bico-ds prepare --held-out` wrote"
    )


def _numbered(recipe: Recipe) -> Iterator[tuple[str, HeldOutTaskSpec]]:
    """Each held-out store with its key, for messages."""
    for number, task in enumerate(recipe.evaluation.tasks):
        if isinstance(task, HeldOutTaskSpec):
            yield f"evaluation.tasks.{number} (held-out store '{task.name}')", task
