"""From shares of tokens or FLOPs (`share_by`) to shares of steps.

Where an objective is drawn at the share p of the steps, and an average step of it has the amount a, it has the share
p a / Σ p a of all tokens or FLOPs. So for the shares w that a recipe gives, p = (w / a) / Σ (w / a).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import Recipe, ShareBy
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.flops import useful_flops
from bico_ds.planner.workload import Drawn, MicroBatch, average_batch


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What real batches of an objective hold: documents of `lengths` int64 [D] in tokens; rows, targets and pairs in all."""

    lengths: NDArray[np.int64]
    rows: int
    targets: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class StepShares:
    """What `recipe` gives shares of, and the probabilities of steps that follow."""

    recipe: Recipe

    @property
    def share_by(self) -> ShareBy:
        """What the recipe's probabilities are shares of."""
        return self.recipe.share_by

    def of_steps(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Return these average batches of the objectives, of as many bins each, with the probabilities of their steps.

        Rounded to 9 digits, so that machines that add up in another order draw the same steps. Raises `UserError` for FLOPs
        of a model whose shapes are not known here.
        """
        if self.share_by == "steps":
            return tuple(batches)
        tokens = self.share_by == "tokens"
        probabilities = self._of_amounts(
            [batch.tokens if tokens else self._flops(batch) for batch in batches]
        )
        return tuple(
            replace(batch, probability=probability)
            for batch, probability in zip(batches, probabilities, strict=True)
        )

    def probabilities(self, drawn: Sequence[Drawn], count: Callable[[int], Counted]) -> list[float]:
        """Return the probabilities of steps by what each objective draws in a data epoch, packed into `bins`.

        FLOPs are those of the specs' `cost`, which knows neither prompts nor entities nor a tokenizer, times what `count`
        finds in batches of the objective of this number beside their documents' cost.
        """
        names, specs = objective_names(self.recipe.objectives), self.recipe.objectives
        if self.share_by == "steps":
            return [spec.probability for spec in specs]
        if self.share_by == "tokens":
            return self._of_amounts([float(epoch.lengths.sum()) / epoch.bins for epoch in drawn])
        amounts = []
        for number, (name, spec, epoch) in enumerate(zip(names, specs, drawn, strict=True)):
            counted = count(number)
            expected = average_batch(name, spec, counted.lengths, share=1.0)
            found = self._useful(rows=counted.rows, targets=counted.targets, pairs=counted.pairs)
            average = average_batch(name, spec, epoch.lengths, share=1 / epoch.bins)
            amounts.append(self._flops(average) * found / self._flops(expected))
        return self._of_amounts(amounts)

    def _of_amounts(self, amounts: Sequence[float]) -> list[float]:
        """By what an average step of each objective has of that which is shared."""
        shares = [spec.probability for spec in self.recipe.objectives]
        weights = [share / amount for share, amount in zip(shares, amounts, strict=True)]
        return [float(f"{weight / sum(weights):.9g}") for weight in weights]

    def _flops(self, batch: MicroBatch) -> float:
        return self._useful(rows=batch.rows, targets=batch.head_rows, pairs=batch.pairs)

    @cached_property
    def _useful(self) -> Callable[..., float]:
        """`useful_flops` of rows, targets and pairs, by the recipe's model."""
        return partial(useful_flops, read_architecture(self.recipe.model), self.recipe.model)
