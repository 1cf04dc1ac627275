"""From shares of tokens or FLOPs (`share_by`) to shares of steps.

Where an objective is drawn at the share p of the steps, and an average step of it has the amount a, it has the share
p a / Σ p a of all tokens or FLOPs. So for the shares w that a recipe gives, p = (w / a) / Σ (w / a).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bico_ds.config.objectives.table import objective_names
from bico_ds.config.schema import Recipe, ShareBy
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.flops import useful_flops
from bico_ds.planner.workload import Drawn, MicroBatch, average_batch


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
        amount = self._amount()
        shares = [spec.probability for spec in self.recipe.objectives]
        weights = [share / amount(batch) for share, batch in zip(shares, batches, strict=True)]
        return tuple(
            replace(batch, probability=float(f"{weight / sum(weights):.9g}"))
            for batch, weight in zip(batches, weights, strict=True)
        )

    def probabilities(self, drawn: Sequence[Drawn]) -> list[float]:
        """Return the probabilities of steps by what each objective draws in a data epoch, packed into `bins`."""
        names, specs = objective_names(self.recipe.objectives), self.recipe.objectives
        batches = [
            average_batch(name, spec, epoch.lengths, share=1 / epoch.bins)
            for name, spec, epoch in zip(names, specs, drawn, strict=True)
        ]
        return [batch.probability for batch in self.of_steps(batches)]

    def _amount(self) -> Callable[[MicroBatch], float]:
        """What a batch has of that which is shared: original tokens, or useful operations."""
        if self.share_by == "tokens":
            return lambda batch: batch.tokens
        model, architecture = self.recipe.model, read_architecture(self.recipe.model)
        return lambda batch: useful_flops(
            architecture, model, rows=batch.rows, targets=batch.head_rows, pairs=batch.pairs
        )
