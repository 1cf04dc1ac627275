"""The recipe's keys of reverse training, and what it costs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.objectives.base import AttentionMode, MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.ntp import NtpSpec

_MAX_WORDS = 25


class ReverseSpec(ObjectiveSpec):
    """Next-token prediction on texts whose segments come in reversed order (2403.13799)."""

    kind: Literal["reverse"] = "reverse"
    segments: Literal["word", "entity", "random"] = Field(
        "word",
        description="what keeps its inner order: a word, an entity (the rest by words), or a random run of words",
    )
    max_words: Annotated[
        int,
        Bound(least=1, most=2**31 - 1, why="a segment has a word, and words are counted by 32-bit numbers"),
    ] = Field(
        _MAX_WORDS, description="the longest random run, in words; only for segments: random", examples=[10]
    )

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#c0392b")
    attention: ClassVar[AttentionMode] = "causal"
    as_written: ClassVar[bool] = False

    @model_validator(mode="after")
    def _only_random_segments_have_a_bound(self) -> ReverseSpec:
        if self.max_words != _MAX_WORDS and self.segments != "random":
            raise ValueError(
                f"'max_words' bounds random segments, and 'segments' is '{self.segments}': leave it out, or set "
                "segments: random"
            )
        return self

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """Exact: next-token prediction on as many tokens."""
        return NtpSpec().cost(lengths)
