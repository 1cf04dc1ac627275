"""The recipe's keys of what is asked and measured during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from bico_ds.common.errors import did_you_mean
from bico_ds.config.bounds import Bound, shown
from bico_ds.config.paths import LocalPath
from bico_ds.config.section import PositiveInt, Section, Steps, mistake_at
from bico_ds.config.sections.held_out import EntryName, HeldOutTaskSpec

QuestionKind = Literal["pairs", "parents", "couplets", "questions"]
Metric = Literal["contains", "prefix", "exact", "bleu", "char_bleu"]

# The tasks that each kind of file makes, by what follows the entry's name: as it is read, and the other way round.
DIRECTIONS: dict[QuestionKind, tuple[str, ...]] = {
    "pairs": ("forward", "backward"),
    "parents": ("child_to_parent", "parent_to_child"),
    "couplets": ("next_line", "previous_line"),
    "questions": (),
}
# What else stands where the names of tasks do: in metrics.jsonl, and in TensorBoard.
_TAKEN = ("text", "held_out", "curves")


class QuestionFileSpec(Section):
    """Questions of your own, from a file: their answers are generated and scored at every evaluation."""

    kind: QuestionKind = Field(
        description="what the file holds: `pairs`, JSONL with `forward` and `backward`, each with `prompt` and "
        "`completion`; `parents`, CSV with child, parent, parent_type; `couplets`, JSONL with `first` and `second`; "
        "`questions`, JSONL with `prompt` and `answer`",
        examples=["pairs"],
    )
    name: EntryName = Field(
        description="of the questions in tags and result files; of a file that is asked in two directions, followed by the "
        "direction: NAME_forward, NAME_backward",
        examples=["company"],
    )
    file: LocalPath = Field(
        description="the file with the questions and their right answers", examples=["questions.jsonl"]
    )
    metric: Metric | None = Field(
        None,
        description="the score that tables, charts and `NAME/headline` show; null: what suits the answers",
        examples=["exact"],
    )
    limit: PositiveInt | None = Field(
        None,
        description="questions that are asked, spread over what they are about; null: `evaluation.limit`",
        examples=[50],
    )

    @property
    def task_names(self) -> list[str]:
        """What its tasks are called in results: one per direction."""
        return [f"{self.name}_{direction}" for direction in DIRECTIONS[self.kind]] or [self.name]


class TextTaskSpec(Section):
    """A retention text: its perplexity, before the first step and at every evaluation; exactly one of `file` and `store`."""

    kind: Literal["text"] = Field("text", description="a retention text, whose perplexity is measured")
    name: EntryName = Field(description="of the text in tags and result files", examples=["wiki"])
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


# By the `kind` of an entry; one without is a text, as all were once.
_ENTRIES: dict[str, type[Section]] = dict.fromkeys(get_args(QuestionKind), QuestionFileSpec) | {
    "text": TextTaskSpec,
    "held_out": HeldOutTaskSpec,
}


def _read_task(value: Any) -> Any:
    """An object as what its kind is, so that its mistakes are told of this, and not of all else that may stand there."""
    if not isinstance(value, dict):
        return value
    kind = value.get("kind", "text")
    if not isinstance(kind, str) or kind not in _ENTRIES:
        guess = did_you_mean(str(kind), _ENTRIES)
        raise mistake_at(
            ("kind",), f"must be one of {', '.join(_ENTRIES)} (found {shown(kind)}){guess}", kind
        )
    return _ENTRIES[kind].model_validate(value)


AnyTask = Annotated[str | QuestionFileSpec | TextTaskSpec | HeldOutTaskSpec, BeforeValidator(_read_task)]


class EvaluationSpec(Section):
    """Reversal tasks during training and at its end."""

    folder: LocalPath | None = Field(
        None,
        description="folder of name-description test files; null: the embedded task's",
        examples=["search_split"],
    )
    tasks: list[AnyTask] = Field(
        default_factory=list,
        description="names of reversal tasks; questions of your own {kind: pairs, parents, couplets or questions, name, "
        "file, metric, limit}; retention texts {kind: text, name, file or store, stop_if_above}; held-out losses "
        "{kind: held_out, name, store}; empty: no evaluation",
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
        None,
        description="prompts per task, spread over the persons, unless an entry of `tasks` has its own; null: all",
        examples=[200],
    )
    likelihood_others: PositiveInt | None = Field(
        None,
        description="also compare the log-probability of the right answer with that of this many other persons' answers; "
        "null: no such test",
        examples=[9],
    )

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationSpec:
        taken: dict[str, str] = {}  # names of entries and of their results, and whose they are
        for number, task in enumerate(self.tasks):
            if isinstance(task, str):
                continue
            results = getattr(task, "task_names", [])
            others = dict.fromkeys(_TAKEN, "other numbers") | {
                name: f"task '{name}'" for name in self.reversal_tasks
            }
            for name in (task.name, *results):
                whose = taken.get(name) or (others.get(name) if name in results else None)
                if whose is not None:
                    raise mistake_at(
                        ("tasks", number, "name"),
                        f"'{name}' is the name of {whose} too, and results are told apart by names; give another one",
                        task.name,
                    )
            taken |= dict.fromkeys((task.name, *results), f"entry {number} ('{task.name}')")
        return self

    @property
    def reversal_tasks(self) -> list[str]:
        """Names of the name-description tasks that are asked."""
        return [task for task in self.tasks if isinstance(task, str)]

    @property
    def question_files(self) -> list[QuestionFileSpec]:
        """The user's own questions."""
        return [task for task in self.tasks if isinstance(task, QuestionFileSpec)]

    @property
    def task_names(self) -> list[str]:
        """What all tasks with questions are called in results, in the order in which they are asked."""
        names = ([task] if isinstance(task, str) else getattr(task, "task_names", []) for task in self.tasks)
        return [name for of_entry in names for name in of_entry]

    @property
    def texts(self) -> list[TextTaskSpec]:
        """The texts whose perplexity is measured."""
        return [task for task in self.tasks if isinstance(task, TextTaskSpec)]

    @property
    def held_out(self) -> list[HeldOutTaskSpec]:
        """The stores whose losses are measured."""
        return [task for task in self.tasks if isinstance(task, HeldOutTaskSpec)]
