"""The recipe's keys of how long the training is, of its batches, and of steps that go wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.section import Section, Steps


def _yaml_off(value: Any) -> Any:
    """The word `off` as it was written: YAML takes it for `false`."""
    return "off" if value is False else value


SpikeFactor = Annotated[
    float, Bound(above=1, most=1e9, why="a step is a spike where it is so many times the median of others")
]


class TrainingSpec(Section):
    """How long the training is, and the batch sizes."""

    steps: Steps | None = Field(
        None, description="optimizer steps of the run; give either these or 'epochs'", examples=[1000]
    )
    epochs: (
        Annotated[
            float,
            Bound(above=0, most=1e9, why="it counts passes over the data, and a run of more never ends"),
        ]
        | None
    ) = Field(None, description="passes over the data; give either these or 'steps'", examples=[3])
    epochs_of: str | None = Field(
        None,
        description="the data source whose passes 'epochs' counts, over all objectives; null: data epochs of the mixture",
        examples=["facts"],
    )
    global_batch_bins: Annotated[
        int, Bound(least=1, most=1_000_000, why="it counts bins, and a step of more never ends")
    ] = Field(8, description="bins per optimizer step, over all ranks", examples=[64])
    micro_batch_bins: Annotated[
        int, Bound(least=1, most=1_000_000, why="they go through the model at once")
    ] = Field(1, description="bins per forward pass of one rank", examples=[2])
    max_grad_norm: Annotated[
        float,
        Bound(
            least=0, most=1e30, why="it is the largest norm of a step's gradient, and 0 stands for no limit"
        ),
    ] = Field(
        1.0, description="gradients of a larger norm are scaled down to it; 0: no clipping", examples=[0.5]
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="where a loss or gradient is NaN or infinite: stop before the update, or skip the update and go on",
    )
    on_spike: Annotated[Literal["off", "warn", "stop"], BeforeValidator(_yaml_off)] = Field(
        "warn",
        description="where the loss or gradient norm is far above its running median (divergence): warn, stop the run "
        "without a checkpoint, or do not look (off)",
        examples=["stop"],
    )
    spike_factors: tuple[SpikeFactor, SpikeFactor] = Field(
        (3.0, 30.0),
        description="so many times its running median the loss is a spike, and the gradient norm",
        examples=[[5, 50]],
    )

    @model_validator(mode="after")
    def _clipping_leaves_a_gradient(self) -> TrainingSpec:
        if 0 < self.max_grad_norm < 1e-6:
            raise ValueError(
                f"'max_grad_norm' must be 0 (no limit) or at least 1e-06, found {self.max_grad_norm:g}: gradients that are "
                "scaled down further are lost beside the optimizer's eps"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.epochs_of is not None and self.epochs is None:
            raise ValueError("'epochs_of' says what 'epochs' counts: give 'epochs' too")
        return self
