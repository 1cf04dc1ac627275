"""What each optimizer keeps of a trained parameter, in bytes: for plans of memory and disks, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Bytes per trained parameter of an optimizer's state, without the weight and its gradient.

    `master`: the fp32 weight that the optimizer updates. `moments`: its other states, by their names in the `state` of
    torch's optimizer; the step count is one number per tensor, and is not counted.
    """

    master: int
    moments: Mapping[str, int]

    @property
    def bytes_per_parameter(self) -> int:
        """Master weight and moments together."""
        return self.master + sum(self.moments.values())


ADAMW = OptimizerState(master=4, moments={"exp_avg": 4, "exp_avg_sq": 4})
