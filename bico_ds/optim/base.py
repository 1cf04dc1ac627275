"""What DeepSpeed's configuration, a checkpoint and a resume ask of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer

from bico_ds.config.sections.optimizer import OptimizerSpec


class OptimizerKind(Protocol):
    """One optimizer: its names, values and checks; `table.OPTIMIZERS` lists all."""

    @property
    def spec(self) -> type[OptimizerSpec]:
        """Its section of the recipe."""
        ...

    @property
    def classes(self) -> tuple[type[Optimizer], ...]:
        """The classes of which DeepSpeed builds one, or a subclass of one."""
        ...

    @property
    def ds_types(self) -> tuple[str, ...]:
        """DeepSpeed's names of it, for `optimizer.type`, in upper or lower case; the first is the default."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """DeepSpeed's parameters of it that a run must not carry, with the reason."""
        ...

    def hyperparameters(self, spec: Any) -> dict[str, Any]:
        """The values of the recipe, by their names in the optimizer's `param_groups`; `lr` is among them.

        DeepSpeed's `optimizer.params` and the recipe's keys have the same names; a DeepSpeed configuration may not set
        them itself.
        """
        ...

    def ds_parameters(self, spec: Any, *, on_cuda: bool) -> dict[str, Any]:
        """DeepSpeed's `optimizer.params`: the hyperparameters, and which implementation runs."""
        ...

    def check(self, filled: dict[str, Any], *, offloaded: bool, where: str) -> None:
        """Raise `UserError` where DeepSpeed would refuse its `optimizer.params` when the engine is built.

        `filled`: the complete DeepSpeed configuration; `offloaded`: whether the state is offloaded to the CPU or NVMe;
        `where` names the file, for the message.
        """
        ...

    def ds_builder(self, *, offloaded: bool, on_cuda: bool) -> str | None:
        """The name of DeepSpeed's builder that compiles it; None where it comes with torch."""
        ...
