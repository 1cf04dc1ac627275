"""The recipe: the validated tree of one run. The descriptions of its fields are the reference documentation of the keys.

In every path, `~` and `${NAME}` are expanded on the machine that uses it (`bico_ds.config.paths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    field_serializer,
    field_validator,
    model_validator,
)

from bico_ds.common.errors import did_you_mean
from bico_ds.config.bounds import Bound
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import objective_names, read_spec
from bico_ds.config.optimizers import ADAMW, OptimizerState
from bico_ds.config.paths import FolderOrHubName, LocalPath, WrittenPath, replace_paths
from bico_ds.config.section import Minutes, PositiveInt, Section, Seed, Steps, mistake_at
from bico_ds.config.sections.data import LEAST_REST, DataSpec
from bico_ds.config.sections.evaluation import EvaluationSpec
from bico_ds.config.sections.keep_best import KeepBestSpec, metrics_of, unknown_metric
from bico_ds.config.sections.lora_keys import refuse_keys_of_peft
from bico_ds.config.sections.retention import REPLAY, ReplaySpec, RetentionSpec


class LoraSpec(Section):
    """Low-rank adapters through `peft`; the base stays frozen."""

    rank: Annotated[int, Bound(least=1, why="it is the inner size of the adapters' matrices")] = Field(
        32,
        description="inner size of the adapters' matrices: a larger one learns more, and takes more memory",
        examples=[64],
    )
    alpha: Annotated[
        float,
        Bound(least=1e-6, most=1e6, why="adapters are scaled by alpha / rank, in the model's precision"),
    ] = Field(
        16.0,
        description="what adapters add is scaled by alpha / rank: raise it together with the rank",
        examples=[32],
    )
    dropout: Annotated[
        float, Bound(least=0, below=1, why="it is the share of an adapter's inputs that are dropped")
    ] = Field(
        0.01,
        description="share of an adapter's inputs that are dropped in training, against overfitting",
        examples=[0.05],
    )
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="the linear layers that get an adapter, by the last word of their names",
        examples=[["q_proj", "v_proj"]],
    )
    rslora: bool = Field(
        False,
        description="scale the adapters by alpha / sqrt(rank), not alpha / rank, which makes high ranks learn slowly "
        "(rsLoRA, arXiv 2312.03732)",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_are_ours(cls, values: Any) -> Any:
        refuse_keys_of_peft(values)
        return values


# Up to so many chunks the head sums its weight's gradient in bf16 (bico_ds/model/head.py). Such a sum stalls once a chunk
# adds less than its rounding: relative error 4e-3 over 16 chunks of 512 rows, 0.17 over 512 chunks of 16, where the
# gradient's own rounding is 2e-3.
LOW_PRECISION_CHUNKS = 16


class ModelSpec(Section):
    """Which network, from which weights."""

    path: FolderOrHubName | None = Field(
        None,
        description="safetensors folder or hub name of the start weights; null: random weights",
        examples=["meta-llama/Llama-3.1-8B"],
    )
    config: dict[str, Any] | None = Field(
        None,
        description="the values of the model's config.json; with them dry runs and plans need no weights",
        examples=[{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3}],
    )
    tokenizer: FolderOrHubName | None = Field(
        None,
        description="tokenizer folder or hub name; null: model.path's, else the first store's or the embedded task's",
        examples=["meta-llama/Llama-3.1-8B"],
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="precision of the forward and backward pass")
    attention_backend: Literal[
        "auto", "flash-attn", "aten-cuda", "flash-attn-3", "flash-attn-4", "triton", "cpu-flash", "oracle"
    ] = Field("auto", description="kernel of the attention passes, see docs/understand.md")
    activation_checkpointing: Annotated[int, Bound(least=0, most=10_000, why="it counts decoder layers")] = (
        Field(
            0,
            description="recompute every k-th decoder layer in the backward pass; 0: none, 1: all",
            examples=[1],
        )
    )
    loss_chunk_rows: Annotated[
        int, Bound(least=1, most=2**31 - 1, why="it counts rows of a batch, by 32-bit numbers")
    ] = Field(
        512,
        description="rows whose logits are in memory at a time; in bf16, batches of over 16 times as many rows take longer",
        examples=[256],
    )
    lora: LoraSpec | None = Field(
        None,
        description="low-rank adapters are trained, and the base stays frozen; null: all weights are trained",
    )
    allow_pickle: bool = Field(False, description="accept pickled weights (they can run code when loaded)")

    @model_validator(mode="after")
    def _has_a_source(self) -> ModelSpec:
        if self.path is None and self.config is None:
            raise ValueError("give 'path' (start weights) or 'config' (random weights of that architecture)")
        return self


# Validated as the spec of its kind (config/objectives/), and dumped as one.
AnyObjective = Annotated[SerializeAsAny[ObjectiveSpec], BeforeValidator(read_spec)]


ShareBy = Literal["steps", "tokens", "flops"]


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


# `output_file` is that of flops_profiler.
_DEEPSPEED_PATHS = frozenset({"nvme_path", "output_file"})


def find_deepspeed_paths(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration, its paths as `LocalPath`; `where` comes before their keys in errors.

    The keys `nvme_path` and `output_file` of any section have paths; `""` and `"auto"` are none.
    """
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = find_deepspeed_paths(value, f"{where}{key}.")
        elif key in _DEEPSPEED_PATHS and isinstance(value, str) and value not in ("", "auto"):
            value = LocalPath(value, where=f"{where}{key}")
        found[key] = value
    return found


class DeepSpeedSpec(Section):
    """A file of ds_configs/, and what this run changes in it."""

    config: LocalPath = Field(
        LocalPath("zero3_bf16"),
        description="name in ds_configs/, or a path to a DeepSpeed JSON",
        examples=["zero2_bf16"],
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of DeepSpeed's own configuration, merged over that file, key by key",
        examples=[{"zero_optimization": {"overlap_comm": False}}],
    )

    @field_validator("overrides")
    @classmethod
    def _paths_in_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        return find_deepspeed_paths(overrides, "deepspeed.overrides.")

    @field_serializer("overrides")
    def _overrides_as_written(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return replace_paths(overrides, str)


class CheckpointSpec(Section):
    """When checkpoints are written, and which of them are kept."""

    every_steps: Steps | None = Field(
        None, description="a checkpoint every so many steps; null: only at the end", examples=[500]
    )
    keep_last: PositiveInt = Field(
        2, description="the newest checkpoints that stay; older ones are deleted", examples=[3]
    )
    keep_every_steps: Steps | None = Field(
        None, description="checkpoints at multiples of this step are never deleted", examples=[5000]
    )
    keep_best: KeepBestSpec | None = Field(
        None,
        description="keep the checkpoint that an evaluation found best, besides the last ones, and export it; null: the end "
        "is exported",
        examples=[{"metric": "company_backward/headline", "mode": "max"}],
    )
    on_write_error: Literal["continue", "stop"] = Field(
        "continue",
        description="where a checkpoint during training cannot be written: go on without it, or stop",
    )
    export: bool = Field(
        True,
        description="write RUN/export at the end: the model as a safetensors folder; of a LoRA run its adapters, for peft",
    )
    merge_adapters: bool = Field(
        False,
        description="let the export of a LoRA run be the whole model, its adapters merged into the base; where the base is "
        "random weights it always is",
    )


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


def _named_sources(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], list[str]]]:
    """The keys that name data sources, and what they name."""
    for number, objective in enumerate(recipe.objectives):
        yield ("objectives", number, "sources"), objective.sources or []
    if recipe.retention is not None:
        yield ("retention", "on"), recipe.retention.on or []
    if recipe.training.epochs_of is not None:
        yield ("training", "epochs_of"), [recipe.training.epochs_of]


class Recipe(Section):
    """The recipe of one run."""

    # As long as a folder's name may be: the run's, runs/NAME.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)] = Field(
        description="of the run, and of its folder runs/NAME; left out: the name of the recipe's file",
        examples=["mine"],
    )
    description: str = Field(
        "", description="one line for `bico-ds train --list-recipes`", examples=["our facts, spans"]
    )
    seed: Seed = Field(
        1, description="seed of random weights, order of the data, masks and every other draw", examples=[2]
    )
    output_dir: LocalPath | None = Field(
        None, description="run folder; null: runs/NAME", examples=["runs/mine"]
    )
    imports: list[WrittenPath] = Field(
        default_factory=list,
        description="modules, or files that end in .py, with further objectives; loaded on every rank before anything else; "
        "a relative path begins at the working directory, as all do",
        examples=[["my_objective.py"]],
    )
    model: ModelSpec
    data: DataSpec
    objectives: Annotated[list[AnyObjective], Field(min_length=1)] = Field(
        description="what is trained: each step is one of these, drawn by their probabilities, which sum to 1",
        examples=[[{"kind": "ntp", "probability": 0.5}, {"kind": "bico", "probability": 0.5}]],
    )
    share_by: ShareBy = Field(
        "steps",
        description="what the objectives' probabilities are shares of: steps, the texts' tokens, or model FLOPs; the steps' "
        "own probabilities follow from what an average step of each objective has",
    )
    # Null once it is one more of `data.sources`.
    replay: ReplaySpec | None = Field(
        None,
        description="other text beside the facts, against forgetting: one more data source, named `replay`; null: none",
    )
    retention: RetentionSpec | None = Field(
        None,
        description="keeps causal steps near the start model, by the divergence from it as a further term; null: no term",
    )
    training: TrainingSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    monitor: MonitorSpec = MonitorSpec()
    distributed: DistributedSpec = DistributedSpec()

    @model_validator(mode="after")
    def _replay_is_a_source(self) -> Recipe:
        """Append `replay` to the data sources: what reads these needs to know of no other place."""
        if self.replay is None:
            return self
        if REPLAY in self.data.source_names:
            raise mistake_at(
                ("replay",),
                "'replay' adds a data source of this name, and 'data.sources' has one already: leave one out, or change the "
                "source's own values there",
                self.replay,
            )
        if any(source.weight is not None for source in self.data.sources):
            raise mistake_at(
                ("replay",),
                "'replay' has a share of the tokens, and 'weight' of 'data.sources' counts documents: give these "
                "'epochs' or 'token_share' in its place",
                self.replay,
            )
        data = self.data.model_copy(update={"sources": [*self.data.sources, self.replay.source]})
        return self.model_copy(update={"data": data, "replay": None})

    @property
    def exports_adapters(self) -> bool:
        """Whether the run's export is an adapter folder; a random base, which is in no file, is exported with adapters."""
        has_base = self.model.lora is not None and self.model.path is not None
        return has_base and not self.checkpoint.merge_adapters

    @model_validator(mode="after")
    def _adapters_to_merge_are_there(self) -> Recipe:
        if self.checkpoint.merge_adapters and self.model.lora is None:
            raise mistake_at(
                ("checkpoint", "merge_adapters"),
                "there are no adapters to merge, as 'model.lora' is null: the export is the whole model without this key",
                True,
            )
        return self

    @model_validator(mode="after")
    def _named_sources_exist(self) -> Recipe:
        names = self.data.source_names
        for key, given in _named_sources(self):
            for name in given:
                if name not in names:
                    raise mistake_at(
                        key,
                        f"there is no data source '{name}'{did_you_mean(name, names)}; there are {', '.join(names)}",
                        given,
                    )
        return self

    @model_validator(mode="after")
    def _every_source_is_drawn_from(self) -> Recipe:
        sets = [self.data.source_numbers(objective.sources) for objective in self.objectives]
        for number, name in enumerate(self.data.source_names):
            if not any(number in members for members in sets):
                raise mistake_at(
                    ("data", "sources", number),
                    f"data source '{name}' is in no objective's 'sources': nothing would be drawn from it",
                    name,
                )
        for index, members in enumerate(sets):
            shares = [self.data.sources[number].token_share for number in members]
            total = sum(share for share in shares if share is not None)
            if None in shares and total > 1 - LEAST_REST:
                raise mistake_at(
                    ("objectives", index),
                    f"the 'token_share' of its data sources sum to {total:.10g}, which leaves "
                    f"{'nothing' if total >= 1 else f'less than {LEAST_REST:g}'} for those without one",
                    total,
                )
        return self

    @model_validator(mode="after")
    def _retention_compares_something(self) -> Recipe:
        """Without adapters to switch off, the model would be compared with itself; BICO's steps are never compared."""
        if self.retention is None:
            return self
        if self.model.lora is None and self.retention.teacher is None:
            raise mistake_at(
                ("retention",),
                "the start model is found by switching adapters off, and 'model.lora' is null: name its stored "
                "log-probabilities as 'teacher' (bico-ds prepare teacher)",
                self.retention,
            )
        on = set(self.data.source_numbers(self.retention.on))
        compared = {
            index: spec
            for index, spec in enumerate(self.objectives)
            if spec.attention == "causal" and on & set(self.data.source_numbers(spec.sources))
        }
        if not compared:
            raise mistake_at(
                ("retention",),
                "it is a term of causal steps, and no objective like {kind: ntp} draws from the data sources that it is on: "
                "nothing would be compared",
                self.retention,
            )
        for index, spec in compared.items():
            if self.retention.teacher is not None and not spec.as_written:
                raise mistake_at(
                    ("objectives", index),
                    f"'retention.teacher' holds log-probabilities of texts as they are written, and {spec.kind} changes "
                    "them: let its 'sources' name none of those that 'retention.on' names",
                    spec.kind,
                )
        return self

    @model_validator(mode="after")
    def _the_best_is_measured(self) -> Recipe:
        best, known = self.checkpoint.keep_best, objective_names(self.objectives)
        if best is None:
            return self
        if (problem := unknown_metric(best.metric, metrics_of(self.evaluation, known))) is not None:
            raise mistake_at(("checkpoint", "keep_best", "metric"), problem, best.metric)
        if self.evaluation.every_steps is None:
            raise mistake_at(
                ("checkpoint", "keep_best"),
                "the model is evaluated at the end alone, where there is nothing to choose from: set "
                "'evaluation.every_steps'",
                best,
            )
        return self

    @model_validator(mode="after")
    def _probabilities_sum_to_one(self) -> Recipe:
        total = sum(objective.probability for objective in self.objectives)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the probabilities of 'objectives' must sum to 1, found {total:g}")
        return self

    @model_validator(mode="after")
    def _a_micro_batch_is_indexed_by_32_bits(self) -> Recipe:
        tokens = self.training.micro_batch_bins * self.data.capacity
        if tokens >= 2**31:
            raise ValueError(
                f"'training.micro_batch_bins' times 'data.capacity' must be less than 2,147,483,648, found {tokens:,}: the "
                "tokens of a forward pass are indexed by 32 bits"
            )
        return self

    @model_validator(mode="after")
    def _global_batch_holds_whole_micro_batches(self) -> Recipe:
        batch, micro = self.training.global_batch_bins, self.training.micro_batch_bins
        if batch % micro:
            raise ValueError(
                f"'training.global_batch_bins' ({batch}) must be a multiple of 'training.micro_batch_bins' ({micro})"
            )
        return self
