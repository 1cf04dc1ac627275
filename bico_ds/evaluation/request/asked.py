"""What `bico-ds evaluate` was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.schema import Recipe
from bico_ds.data.tokenizer import FastTokenizer, load_tokenizer
from bico_ds.evaluation.loading import begins_with_bos, load_generation_config
from bico_ds.evaluation.run_tasks import GenerationOptions, options_in_training
from bico_ds.evaluation.scoring.generation import stop_ids

Load = Callable[[FolderOrHub, str], tuple[Any, Any]]  # of a model by path and option: (model, tokenizer)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask of which model.

    `data`: folder of the name-description tasks `tasks`. `further`: files of other test sets, by their kind in
    `further_sets.READERS`. `retention`: texts to measure perplexity on, in windows of `window` tokens. `instructions`: a
    file of instructions, to compare the answers with the base's. `base`: the model before fine-tuning. `likelihood`: run
    the log-probability test, against `others` other persons' answers. `limit`: prompts of each task at most. `train`: token
    stores to search for the questions, so that what their texts hold in the order asked is scored apart. `bos`: whether
    texts begin with BOS; None: as `begins_with_bos` says. `recipe`: what it asks during training is asked in the same way,
    in place of `data` and `further` (`asking_as`). `samples`: answers of each task that are shown.
    """

    model: FolderOrHub
    output: Path
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    further: Mapping[str, Path] = field(default_factory=dict)
    retention: tuple[Path, ...] = ()
    instructions: Path | None = None
    base: FolderOrHub | None = None
    likelihood: bool = False
    limit: int | None = None
    max_new_tokens: int = 40
    others: int = 9
    train: tuple[Path, ...] = ()
    window: int = 1024
    bos: bool | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    recipe: Recipe | None = None
    samples: int = 0

    @cached_property
    def add_bos(self) -> bool:
        """Whether texts begin with BOS, where the tokenizer has one."""
        if self.bos is not None:
            return self.bos
        return begins_with_bos(self.model, self.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        """The tokens at which answers end."""
        return stop_ids(self.generation_config, self.tokenizer)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The model's."""
        return load_generation_config(self.model)

    @cached_property
    def tokenizer(self) -> FastTokenizer:
        """The model's."""
        return load_tokenizer(self.model)

    @property
    def generation(self) -> GenerationOptions:
        """As in the papers: every answer may have up to `max_new_tokens`; or as during the training of a recipe."""
        if self.recipe is not None:
            return options_in_training(self.recipe.evaluation, add_bos=self.add_bos)
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens, cut_to_answers=False, add_bos=self.add_bos
        )


def asking_as(recipe: Recipe, request: Request) -> Request:
    """The request with what the recipe's `evaluation` asks. Raises `UserError` where that is nothing."""
    spec = recipe.evaluation
    if not spec.tasks:
        raise UserError(
            f"--tasks-from {recipe.name}: its evaluation.tasks are empty, so there is nothing to ask"
        )
    return replace(
        request,
        recipe=recipe,
        max_new_tokens=spec.max_new_tokens,
        likelihood=spec.likelihood_others is not None,
        others=spec.likelihood_others or request.others,
    )
