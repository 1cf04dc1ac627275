"""The recipe's keys of next-token prediction, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.objectives.base import AttentionMode, MonitorPlace, ObjectiveCost, ObjectiveSpec


class NtpSpec(ObjectiveSpec):
    """Next-token prediction under causal attention."""

    kind: Literal["ntp"] = "ntp"
    loss_on: Literal["all", "completion", "replies"] = Field(
        "all",
        description="which tokens have a loss: all; of completions, in chats the last reply; or of all replies of a chat",
    )

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#3b75af")
    attention: ClassVar[AttentionMode] = "causal"

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """Exact, but for `loss_on: completion` and `replies`, which have fewer `head_rows`: one per such token."""
        tokens = lengths.astype(np.float64)
        return ObjectiveCost(
            kept_rows=tokens,
            live_rows=np.zeros_like(tokens),
            pairs=tokens * (tokens + 1) / 2,
            head_rows=tokens - 1,
        )
