"""The recipe's keys of the optimizer and of the learning rate over the steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.optimizers import ADAMW, OptimizerState
from bico_ds.config.section import Section

Decay = Annotated[
    float,
    Bound(
        least=0, below=1, why="it is the share of the old mean that a step keeps, and from 1 on means explode"
    ),
]


class OptimizerSpec(Section):
    """AdamW; under CPU or NVMe offload DeepSpeed's CPU Adam."""

    state: ClassVar[OptimizerState] = ADAMW

    lr: Annotated[
        float,
        Bound(
            least=1e-12,
            most=1,
            why="a step moves each weight by about lr, and weights are far smaller than 1",
        ),
    ] = Field(
        2e-5,
        description="the learning rate after the warm-up, at its highest: the first value to search (docs/run.md, Choose "
        "values)",
        examples=[1e-5],
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999),
        description="the share of its old value that a step keeps of the gradient's running mean, and of its mean square",
        examples=[[0.9, 0.95]],
    )
    eps: Annotated[
        float,
        Bound(
            least=1e-20,
            most=1,
            why="a gradient's mean is divided by the root of its mean square plus eps, in fp32",
        ),
    ] = Field(
        1e-8,
        description="added to the root of the mean square, by which the gradient's mean is divided",
        examples=[1e-6],
    )
    weight_decay: Annotated[
        float, Bound(least=0, most=1e12, why="a step shrinks each weight by the factor 1 - lr * weight_decay")
    ] = Field(
        0.0,
        description="a step shrinks each weight by the factor 1 - lr * weight_decay; 0: none",
        examples=[0.1],
    )

    @model_validator(mode="after")
    def _decay_shrinks(self) -> OptimizerSpec:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"'lr' times 'weight_decay' must be less than 1, found {self.lr * self.weight_decay:g}: "
                "a step shrinks each weight by the factor 1 - lr * weight_decay"
            )
        return self


class ScheduleSpec(Section):
    """Learning-rate schedule, by transformers' names."""

    name: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = Field(
        "cosine",
        description="the learning rate after the warm-up; warmup_stable_decay: constant, with a decay at the end",
    )
    warmup_steps: Annotated[int, Bound(least=0, why="it counts steps of the run")] = Field(
        0, description="steps in which the learning rate rises from 0 to optimizer.lr", examples=[100]
    )
    decay_steps: Annotated[int, Bound(least=0, why="it counts steps of the run")] | None = Field(
        None, description="only for warmup_stable_decay: steps of the final decay", examples=[150]
    )
    min_lr_ratio: Annotated[float, Bound(least=0, most=1, why="it is a share of optimizer.lr")] = Field(
        0.0, description="the rate at the end of the decay, as a share of optimizer.lr", examples=[0.1]
    )

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> ScheduleSpec:
        if (self.decay_steps is not None) != (self.name == "warmup_stable_decay"):
            raise ValueError("'decay_steps' belongs to 'warmup_stable_decay', and that needs it")
        return self

    @model_validator(mode="after")
    def _a_floor_belongs_to_a_decay(self) -> ScheduleSpec:
        if self.min_lr_ratio and self.name == "constant":
            raise ValueError("'min_lr_ratio' is where a decay ends, and 'constant' has none: set it to 0")
        return self
