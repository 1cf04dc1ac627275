"""The recipe's keys against forgetting: replayed texts, and the divergence from the start model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath
from bico_ds.config.section import Section
from bico_ds.config.sections.data import SampledTokens, SourceSpec, TokenShare

REPLAY = "replay"


class ReplaySpec(Section):
    """Other text beside the facts, as one more data source named `replay`; exactly one of `tokens` and `store`."""

    tokens: SampledTokens | None = Field(
        None,
        description="so many tokens sampled from the start model itself, made at the first use",
        examples=[100_000],
    )
    store: LocalPath | None = Field(
        None, description="a token store of other text", examples=["stores/other_text"]
    )
    token_share: TokenShare = Field(
        0.25,
        description="its share of the tokens of the steps whose objective has this source",
        examples=[0.1],
    )

    @model_validator(mode="after")
    def _one_kind(self) -> ReplaySpec:
        if (self.tokens is None) == (self.store is None):
            raise ValueError("give exactly one of 'tokens' (sampled from the start model) and 'store'")
        return self

    @property
    def source(self) -> SourceSpec:
        """The data source that this stands for."""
        return SourceSpec(name=REPLAY, sampled=self.tokens, store=self.store, token_share=self.token_share)


class RetentionSpec(Section):
    """KL(start model ‖ model in training) as a further term of causal steps (2605.29498)."""

    kl: Annotated[
        float, Bound(above=0, most=1e6, why="it is the weight of the divergence beside the loss")
    ] = Field(
        description="weight of the divergence, the mean over the compared rows of a step, in nats",
        examples=[0.5],
    )
    on: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="names of the data sources whose rows are compared; null: all of them",
        examples=[["replay"]],
    )
    exclude_target: bool = Field(
        False,
        description="leave the target token out of both distributions, so that learning it costs nothing",
    )
    teacher: LocalPath | None = Field(
        None,
        description="stored log-probabilities of the start model, by `bico-ds prepare teacher`; null: with adapters, "
        "computed by switching them off",
        examples=["stores/teacher"],
    )
