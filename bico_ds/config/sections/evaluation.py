"""The recipe's keys of what is asked and measured during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath
from bico_ds.config.section import PositiveInt, Section, Steps


class TextTaskSpec(Section):
    """A retention text: its perplexity, before the first step and at every evaluation; exactly one of `file` and `store`."""

    kind: Literal["text"] = Field("text", description="a retention text, whose perplexity is measured")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="of the text in tags and result files", examples=["wiki"]
    )
    file: LocalPath | None = Field(
        None, description="UTF-8 text; never one that is trained on", examples=["wiki.txt"]
    )
    store: LocalPath | None = Field(
        None, description="a token store that `bico-ds prepare` wrote", examples=["stores/wiki"]
    )
    tokens: PositiveInt | None = Field(
        None, description="only so many tokens from the beginning; null: all of them", examples=[50_000]
    )
    window: Annotated[int, Bound(least=2, most=2**20, why="a token is predicted from those before it")] = (
        Field(1024, description="tokens that are read at once", examples=[2048])
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
        examples=[2],
    )

    @model_validator(mode="after")
    def _one_text(self) -> TextTaskSpec:
        if (self.file is None) == (self.store is None):
            raise ValueError("give exactly one of 'file' and 'store'")
        return self


def _read_task(value: Any) -> Any:
    """An object as what it describes, so that its mistakes are told of this, and not of the names that also stand there."""
    return TextTaskSpec.model_validate(value) if isinstance(value, dict) else value


AnyTask = Annotated[str | TextTaskSpec, BeforeValidator(_read_task)]


class EvaluationSpec(Section):
    """Reversal tasks during training and at its end."""

    folder: LocalPath | None = Field(
        None,
        description="folder of name-description test files; null: the embedded task's",
        examples=["search_split"],
    )
    tasks: list[AnyTask] = Field(
        default_factory=list,
        description="names of reversal tasks, and retention texts {kind: text, name, file or store, stop_if_above}; empty: "
        "no evaluation",
        examples=[["n2d", "n2d_reverse"]],
    )
    every_steps: Steps | None = Field(
        None, description="an evaluation every so many steps; null: only at the end", examples=[100]
    )
    batch_size: PositiveInt = Field(
        64,
        description="prompts that a rank answers at a time; lower it where an evaluation runs out of memory",
        examples=[16],
    )
    max_new_tokens: Annotated[
        int, Bound(least=1, most=2**20, why="an answer that never ends is cut there")
    ] = Field(
        40,
        description="tokens of an answer, at most; raise it where right answers are longer",
        examples=[100],
    )
    limit: PositiveInt | None = Field(
        None, description="prompts per task, spread over the persons; null: all", examples=[200]
    )
    likelihood_others: PositiveInt | None = Field(
        None,
        description="also compare the log-probability of the right answer with that of this many other persons' answers; "
        "null: no such test",
        examples=[9],
    )

    @model_validator(mode="after")
    def _text_names_differ(self) -> EvaluationSpec:
        names = [text.name for text in self.texts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two texts of 'tasks' are named '{twice}': their tags would be the same")
        return self

    @property
    def reversal_tasks(self) -> list[str]:
        """Names of the tasks that are asked."""
        return [task for task in self.tasks if isinstance(task, str)]

    @property
    def texts(self) -> list[TextTaskSpec]:
        """The texts whose perplexity is measured."""
        return [task for task in self.tasks if isinstance(task, TextTaskSpec)]
