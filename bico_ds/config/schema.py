"""The recipe: the validated tree of one run. The descriptions of its fields are the reference documentation of the keys.

In every path, `~` and `${NAME}` are expanded on the machine that uses it (`bico_ds.config.paths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from bico_ds.common.errors import did_you_mean
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import objective_names, read_spec
from bico_ds.config.paths import LocalPath, WrittenPath
from bico_ds.config.section import Section, Seed, mistake_at
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.config.sections.data import LEAST_REST, DataSpec
from bico_ds.config.sections.deepspeed import DeepSpeedSpec
from bico_ds.config.sections.distributed import DistributedSpec
from bico_ds.config.sections.evaluation import EvaluationSpec
from bico_ds.config.sections.keep_best import metrics_of, unknown_metric
from bico_ds.config.sections.model import ModelSpec
from bico_ds.config.sections.monitor import MonitorSpec
from bico_ds.config.sections.optimizer import OptimizerSpec, ScheduleSpec
from bico_ds.config.sections.retention import REPLAY, ReplaySpec, RetentionSpec
from bico_ds.config.sections.training import TrainingSpec

# Validated as the spec of its kind (config/objectives/), and dumped as one.
AnyObjective = Annotated[SerializeAsAny[ObjectiveSpec], BeforeValidator(read_spec)]


ShareBy = Literal["steps", "tokens", "flops"]


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
