"""The recipe's keys of ranks, of their time limits, and of the signals that end a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath
from bico_ds.config.section import Minutes, Section


class DistributedSpec(Section):
    """Number of ranks, time limits, signals."""

    world_size: Annotated[int, Bound(least=1, most=10_000_000, why="it counts processes")] | None = Field(
        None,
        description="ranks this recipe is made for, and refuses to start on another number; null: any number",
        examples=[8],
    )
    gpu: LocalPath | None = Field(
        None,
        description="the GPUs that plans and dry runs are for: a name (bico-ds plan --help), or a YAML file",
        examples=["h100-80g"],
    )
    timeout_minutes: Minutes = Field(
        30.0, description="minutes after which ranks that wait for another one give up", examples=[60]
    )
    watchdog_minutes: Minutes = Field(
        20.0,
        description="minutes without a step after which all stacks are dumped and the run is aborted",
        examples=[60],
    )
    preempt_signals: list[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]] = Field(
        ["SIGTERM", "SIGINT", "SIGUSR1"],
        description="signals at which the run saves a checkpoint and ends; resume it by the same command",
        examples=[["SIGTERM", "SIGINT", "SIGUSR2"]],
    )
