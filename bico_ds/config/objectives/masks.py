"""The recipe's keys of masks: which tokens are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.objectives.base import ObjectiveCost
from bico_ds.config.section import Probability, Section

Eligible = Annotated[
    Literal["all", "completion", "replies"],
    Field(
        description="which tokens can be masked: all; those after the prompt (completion); or of all replies of a chat "
        "(replies)"
    ),
]
Predict = Annotated[
    Literal["next", "same"],
    Field(
        description="what the output at a masked token's row predicts: the token at the next position (the BICO paper), or "
        "its own (BERT)"
    ),
]
PlaceholderId = Annotated[
    Annotated[int, Bound(least=0, why="it is a token's id")] | None,
    Field(
        description="input id of a masked position; null: the tokenizer's unk, pad or eos", examples=[128002]
    ),
]

_Share = Annotated[float, Bound(least=0, most=1, why="it is a share of the eligible tokens")]

_MEAN_SPAN = 3.0
_RATES = 16  # Gauss-Legendre nodes over a range of rates: exact for polynomials up to degree 31


@dataclass(frozen=True, kw_only=True)
class MaskExpectation:
    """Expected counts in documents, each float64 [D].

    `masked`: tokens that are masked; `live`: those of them whose successor is masked too; `pairs`: (query, key) pairs of
    kept and live queries with kept keys. `span_pairs`: pairs of two live tokens in one run of masked tokens, the key not
    behind the query. `masked_squared`: the square of the number of masked tokens.
    """

    masked: NDArray[np.float64]
    live: NDArray[np.float64]
    pairs: NDArray[np.float64]
    span_pairs: NDArray[np.float64]
    masked_squared: NDArray[np.float64]

    def denoising_cost(self, lengths: NDArray[np.int64], predict: Predict) -> ObjectiveCost:
        """The cost of documents of these lengths [D] where no query sees a masked token."""
        kept = lengths - self.masked
        same = predict == "same"
        return ObjectiveCost(
            kept_rows=kept,
            live_rows=self.masked if same else self.live,
            # Every token is a query.
            pairs=lengths * kept if same else self.pairs,
            head_rows=self.masked,
        )


class MaskSpec(Section):
    """Which tokens are masked: drawn per document, never special tokens, never a document's first token."""

    rate: Probability | tuple[_Share, _Share] = Field(
        0.15,
        description="share of the eligible tokens that are masked; [low, high]: drawn per document, uniform in that range",
        examples=[[0.2, 0.6]],
    )
    unit: Literal["token", "span", "word", "entity"] = Field(
        "token",
        description="what is masked as a whole: a token, a run of tokens (span), a word, or an entity of the data",
    )
    mean_span: Annotated[float, Bound(least=1, or_infinite=True, why="a span has a token, or no end")] = (
        Field(
            _MEAN_SPAN,
            description="mean length of a span, in tokens (geometric); with unit: entity, what plans expect",
            examples=[5],
        )
    )
    eligible: Eligible = Field(
        "all",
        description="which tokens may be masked: all; of completions, in chats the last reply; or of all replies of a chat",
    )

    @model_validator(mode="after")
    def _rate_is_a_range(self) -> MaskSpec:
        if isinstance(self.rate, tuple) and (self.rate[0] > self.rate[1] or self.rate[1] == 0):
            raise ValueError(
                f"'rate' must satisfy 0 <= low <= high <= 1 and 0 < high, or nothing is masked; found {list(self.rate)}"
            )
        return self

    @model_validator(mode="after")
    def _only_spans_have_a_length(self) -> MaskSpec:
        if self.mean_span != _MEAN_SPAN and self.unit in ("token", "word"):
            raise ValueError(
                f"'mean_span' is the length of spans, and 'unit' is '{self.unit}', which has none; leave it out, or set "
                "unit: span"
            )
        return self

    @field_validator("rate")
    @classmethod
    def _one_rate_is_a_number(cls, rate: float | tuple[float, float]) -> float | tuple[float, float]:
        """[0.4, 0.4] is 0.4: one mask, one identity."""
        return rate[0] if isinstance(rate, tuple) and 0 < rate[0] == rate[1] else rate

    def expect(self, lengths: NDArray[np.int64]) -> MaskExpectation:
        """What a mask does to documents of these lengths [D], in expectation.

        Where the special tokens, prompts, words and entities are does not follow from a length. All tokens but the first
        count as eligible, words as single tokens, and entities as spans of `mean_span` tokens that are everywhere. Where
        fewer tokens are eligible (special tokens, `eligible: completion` or `replies`, entities), `pairs` is too low and the
        others are too high; words of several tokens and longer entities have more live ones.
        """
        low, high = self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)
        nodes, weights = np.polynomial.legendre.leggauss(_RATES)
        rates = low + (high - low) * (nodes + 1) / 2
        parts = [self._expect_at(float(rate), lengths.astype(np.float64)) for rate in rates]
        mean = np.tensordot(weights / 2, np.array(parts), axes=1)
        return MaskExpectation(
            masked=mean[0], live=mean[1], pairs=mean[2], span_pairs=mean[3], masked_squared=mean[4]
        )

    def _expect_at(self, rate: float, tokens: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """The columns of a `MaskExpectation` of documents at one rate.

        A mask is a stationary two-state chain (objectives/masks.py) in which tokens at distance d correlate by r^d. Pairs
        are E[K² + V K] with K = T - B kept tokens and V live ones, so they need Var(B) and Cov(V, B): sums of r^d. Two live
        tokens at distance d are of one run with the probability rate · stays^(d + 1).
        """
        stays = rate  # probability that the token behind a masked one is masked
        if self.unit in ("span", "entity"):
            stays = 1.0 - min(1.0 / self.mean_span, 1.0 - rate)
        r = min((stays - rate) / (1.0 - rate), 1 - 1e-6) if rate < 1 else 0.0  # 1: a span without an end
        n, m = tokens - 1, np.maximum(tokens - 2, 0)  # tokens, and neighbours, that can be masked
        masked, live = rate * n, rate * stays * m
        variance = rate * (1 - rate) * (n * (1 + r) - 2 * r * (1 - r**n) / (1 - r)) / (1 - r)
        covariance = 2 * rate * stays * (1 - rate) * (m - r * (1 - r**m) / (1 - r)) / (1 - r)
        kept = tokens - masked
        s = min(stays, 1 - 1e-6)  # 1: all tokens are one run
        span_pairs = rate * s * (n * (1 - s) - (1 - s**n)) / (1 - s) ** 2
        pairs = kept**2 + variance + live * kept - covariance
        return [masked, live, pairs, span_pairs, masked**2 + variance]
