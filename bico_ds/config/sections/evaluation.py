"""The recipe's keys of what is asked and measured during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath
from bico_ds.config.section import PositiveInt, Section, Steps
from bico_ds.config.sections.held_out import HeldOutTaskSpec


class TextTaskSpec(Section):
    """A retention text: its perplexity, before the first step and at every evaluation; exactly one of `file` and `store`."""

    kind: Literal["text"] = "text"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="of the text in tags and result files"
    )
    file: LocalPath | None = Field(None, description="UTF-8 text; never one that is trained on")
    store: LocalPath | None = Field(None, description="a token store that `bico-ds prepare` wrote")
    tokens: PositiveInt | None = Field(
        None, description="only so many tokens from the beginning; null: all of them"
    )
    window: Annotated[int, Bound(least=2, most=2**20, why="a token is predicted from those before it")] = (
        Field(1024, description="tokens that are read at once")
    )
    stop_if_above: (
        Annotated[
            float,
            Bound(above=1, most=1e9, why="it is so many times the start model's perplexity, which is 1"),
        ]
        | None
    ) = Field(
        None,
        description="the run saves and stops once the perplexity is above so many times that before training",
    )

    @model_validator(mode="after")
    def _one_text(self) -> TextTaskSpec:
        if (self.file is None) == (self.store is None):
            raise ValueError("give exactly one of 'file' and 'store'")
        return self


def _read_task(value: Any) -> Any:
    """An object as what it describes, so that its mistakes are told of this, and not of the names that also stand there."""
    if not isinstance(value, dict):
        return value
    spec = HeldOutTaskSpec if value.get("kind") == "held_out" else TextTaskSpec
    return spec.model_validate(value)


AnyTask = Annotated[str | TextTaskSpec | HeldOutTaskSpec, BeforeValidator(_read_task)]


class EvaluationSpec(Section):
    """Reversal tasks during training and at its end."""

    folder: LocalPath | None = Field(
        None, description="folder of name-description test files; null: the embedded task's"
    )
    tasks: list[AnyTask] = Field(
        default_factory=list,
        description="names of reversal tasks, retention texts {kind: text, name, file or store, stop_if_above}, and "
        "held-out losses {kind: held_out, name, store}; empty: no evaluation",
    )
    every_steps: Steps | None = Field(None, description="null: only at the end")
    batch_size: PositiveInt = 64
    max_new_tokens: Annotated[
        int, Bound(least=1, most=2**20, why="an answer that never ends is cut there")
    ] = 40
    limit: PositiveInt | None = Field(
        None, description="prompts per task, spread over the persons; null: all"
    )
    likelihood_others: PositiveInt | None = Field(
        None,
        description="also compare the log-probability of the right answer with that of this many other persons' answers; "
        "null: no such test",
    )

    @model_validator(mode="after")
    def _text_names_differ(self) -> EvaluationSpec:
        for kind, named in (("texts", self.texts), ("held-out stores", self.held_out)):
            names = [task.name for task in named]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two {kind} of 'tasks' are named '{twice}': their tags would be the same")
        return self

    @property
    def reversal_tasks(self) -> list[str]:
        """Names of the tasks that are asked."""
        return [task for task in self.tasks if isinstance(task, str)]

    @property
    def texts(self) -> list[TextTaskSpec]:
        """The texts whose perplexity is measured."""
        return [task for task in self.tasks if isinstance(task, TextTaskSpec)]

    @property
    def held_out(self) -> list[HeldOutTaskSpec]:
        """The stores whose losses are measured."""
        return [task for task in self.tasks if isinstance(task, HeldOutTaskSpec)]
