"""The loss of a recipe's held-out stores, as during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.common.errors import UserError
from bico_ds.data.store import TokenStore
from bico_ds.data.token_roles import token_roles
from bico_ds.evaluation.held_out import loss as held_out_loss
from bico_ds.evaluation.held_out.stores import HeldOutStore, check_held_out, read_held_out
from bico_ds.evaluation.loading import config_at
from bico_ds.evaluation.request.asked import Load, Request
from bico_ds.evaluation.result_file import Part, identity_of
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.model.build import TrainableModel, as_trained
from bico_ds.model.swap import check_attention
from bico_ds.objectives.build import build_objectives


def held_out_of(request: Request, trained: Sequence[TokenStore], share: PromptShare) -> list[HeldOutStore]:
    """The recipe's held-out stores, as its objectives read them; `trained`: the stores that --train names.

    Raises `UserError` as `read_held_out` does, and for a model that has another attention than those that are trained.
    """
    recipe = request.recipe
    if recipe is None or not recipe.evaluation.held_out:
        return []
    check_held_out(recipe, verify="once" if share.is_first else "structure")
    config = config_at(request.model)
    try:
        check_attention(config, longest_document=recipe.data.capacity)
    except UserError as error:
        raise UserError(
            f"--model {request.model}: held-out losses are measured with the attention of training: {error}"
        ) from None
    tokens = token_roles(request.tokenizer, vocabulary=config.vocab_size)
    objectives = build_objectives(recipe.objectives, tokens)
    return read_held_out(recipe, request.tokenizer, trained, objectives, vocabulary=config.vocab_size)


def held_out_parts(
    request: Request, share: PromptShare, stores: Sequence[HeldOutStore], load: Load
) -> Iterator[Part]:
    """The loss of every held-out store, as during training.

    They come after all that the model itself is asked, because it is changed in place: no memory is needed for a second one.
    """
    recipe = request.recipe

    @cache
    def trained() -> tuple[TrainableModel, LayoutPolicy | None]:
        assert recipe is not None, "the stores are of its evaluation.tasks"
        causal_lm, _ = load(request.model, "--model")
        rows, longest = recipe.model.loss_chunk_rows, recipe.data.capacity
        model = as_trained(causal_lm, longest_document=longest, loss_chunk_rows=rows)
        head_dim = causal_lm.model.layers[0].self_attn.head_dim
        backend = resolve("auto", causal_lm.dtype, head_dim, share.device)
        return model, None if backend is None else backend.policy

    def compute(store: HeldOutStore) -> dict[str, Any] | None:
        model, policy = trained()
        found = held_out_loss.measure(model, [store], share, policy)
        return None if found is None else found[store.spec.name]

    for store in stores:
        yield Part(
            section="held_out",
            name=store.spec.name,
            identity=identity_of({name: batches.identity for name, batches in store.batches.items()}),
            size=sum(batches.count for batches in store.batches.values()),
            compute=partial(compute, store),
        )
