"""The recipe's keys of where metrics are written."""

from __future__ import annotations

from pydantic import Field

from bico_ds.config.section import Section, Steps


class WandbSpec(Section):
    """Weights & Biases, through DeepSpeed's monitor."""

    project: str = Field(description="the project that has the run", examples=["reversal"])
    team: str | None = Field(
        None, description="the team that the project belongs to; null: your own account", examples=["my-lab"]
    )
    group: str | None = Field(
        None, description="runs of one group are shown together; null: none", examples=["lr-search"]
    )


class MonitorSpec(Section):
    """Where metrics are written besides the console and metrics.jsonl."""

    tensorboard: bool = Field(True, description="event files for TensorBoard (`bico-ds tensorboard`)")
    csv: bool = Field(False, description="one CSV file per metric")
    wandb: WandbSpec | None = Field(
        None, description="Weights & Biases, through DeepSpeed's monitor; null: not used"
    )
    every_steps: Steps = Field(
        1,
        description="steps from one point of a curve to the next; raise it where steps take milliseconds",
        examples=[10],
    )
