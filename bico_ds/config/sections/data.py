"""The recipe's keys of its data: sources, how they are mixed, and how texts are packed."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from bico_ds.common.printable import on_one_line
from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath, no_path
from bico_ds.config.section import PositiveInt, Section, Seed
from bico_ds.config.unique_names import unique_names

_MOST_SAMPLED = 10**8
_MOST_SHOWN = 60

LEAST_REST = 1e-4
"""What token shares leave to the sources without one: a data epoch is so many times as large, and planned as a whole."""

Derive = Literal["other_order", "identity_bridge"]
TokenShare = Annotated[
    float, Bound(least=1e-9, below=1, why="it is a share of the tokens, and the other sources have the rest")
]
SampledTokens = Annotated[
    int,
    Bound(
        least=1,
        most=_MOST_SAMPLED,
        why="a start samples them, which takes hours; bico-ds prepare replay makes larger stores",
    ),
]


class FactsSpec(Section):
    """The embedded task: fictitious persons in the form of the name-description set (2309.12288)."""

    seed: Seed = Field(1, description="another seed makes other persons and texts", examples=[2])
    name_first: PositiveInt = Field(
        20, description="persons whose training texts all have the name first", examples=[30]
    )
    description_first: PositiveInt = Field(
        20, description="persons whose training texts all have the description first", examples=[30]
    )
    both: PositiveInt = Field(
        60, description="persons whose training texts come in both orders", examples=[90]
    )
    variants: PositiveInt = Field(6, description="training texts per person and order", examples=[30])
    test_prompts: PositiveInt = Field(4, description="held-out prompts per person and task", examples=[10])


_READING_OPTIONS = (
    "text_field",
    "prompt_field",
    "messages_field",
    "group_field",
    "entities_field",
    "entities_pattern",
    "text_by",
    "leading_space",
)


def _begins_a_folder(name: str) -> str:
    """The name of a source, with which that of its store in `cache_dir` begins. Raises `ValueError` where it cannot."""
    problem = no_path(name)
    if problem is None and (name.startswith("/") or ".." in name.split("/")):
        problem = "it leads out of 'data.cache_dir', in which its store's name begins so;"
    if problem is not None:
        raise ValueError(f"'{on_one_line(name, most=_MOST_SHOWN)}': {problem} give another name")
    return name


class SourceSpec(Section):
    """One data source; exactly one of `store`, `files`, `facts` and `sampled`."""

    name: Annotated[str, AfterValidator(_begins_a_folder)] | None = Field(
        None, description="name in logs, and in other keys; null: taken from the path", examples=["facts"]
    )
    store: LocalPath | None = Field(
        None, description="a token store that `bico-ds prepare` wrote", examples=["stores/mine"]
    )
    files: list[LocalPath] | None = Field(
        None,
        description="JSONL, Parquet or text files, folders or patterns of them; tokenized at the first use",
        examples=[["data/*.jsonl"]],
    )
    facts: Literal["both_orders", "all"] | None = Field(
        None, description="the embedded task: all persons, or only those whose texts come in both orders"
    )
    sampled: SampledTokens | None = Field(
        None,
        description="so many tokens sampled from the start model (model.path); made at the first use below a billion "
        "parameters, else by `bico-ds prepare replay`",
        examples=[100_000],
    )
    text_field: str = Field(
        "text", description="the field of a record, or column, that holds the text", examples=["body"]
    )
    prompt_field: str | None = Field(
        None,
        description="with completion_field: the first of two fields that make one text, without anything between",
        examples=["prompt"],
    )
    completion_field: str | None = Field(
        None, description="with prompt_field: the second of the two fields", examples=["completion"]
    )
    messages_field: str | None = Field(
        None,
        description="the field with a chat, a list of {role, content}, rendered with the tokenizer's chat template",
        examples=["messages"],
    )
    group_field: str | None = Field(
        None,
        description="the field that says which person or cluster a text is about: a number or a string",
        examples=["person"],
    )
    entities_field: str | None = Field(
        None,
        description="the field with [start, end] pairs of characters, for masks by entity and texts derived from entities",
        examples=["entities"],
    )
    entities_pattern: str | None = Field(
        None,
        description="a regular expression whose matches in the text are its entities, instead of a field",
        examples=["[A-Z][a-z]+ [A-Z][a-z]+"],
    )
    derive: Derive | None = Field(
        None,
        description="texts made of those of 'files' or 'facts', instead of them: other_order exchanges the two "
        "entities, or prompt and completion; identity_bridge: 'The name of A is A.' for each entity A",
    )
    text_by: Literal["line", "file"] = Field(
        "line", description="what is a document in a plain-text file: each line, or the file"
    )
    add_bos: bool = Field(True, description="begin each text with the tokenizer's BOS token, if it has one")
    add_eos: bool = Field(
        True, description="end each text with the tokenizer's EOS token, so that the model learns to stop"
    )
    leading_space: bool = Field(
        False,
        description="tokenize each text of 'files' with a space before it, so that its first word has the others' form",
    )
    weight: (
        Annotated[float, Bound(least=1e-15, most=1e15, why="shares are computed from the sum of all weights")]
        | None
    ) = Field(
        None,
        description="share of the sampled documents, relative to the other sources' weights",
        examples=[2],
    )
    epochs: (
        Annotated[
            float,
            Bound(above=0, most=10_000, why="a data epoch is planned as a whole; training.epochs repeats it"),
        ]
        | None
    ) = Field(
        None,
        description="passes over this source in a data epoch; 0.3: another 30 % of it in each; null: one",
        examples=[2],
    )
    token_share: TokenShare | None = Field(
        None,
        description="share of the tokens of the steps whose objective has this source; sources without one have the rest",
        examples=[0.25],
    )

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> SourceSpec:
        kinds = ("store", "files", "facts", "sampled")
        given = [key for key in kinds if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of 'store', 'files', 'facts', 'sampled'; found {given or 'none'}"
            )
        shares = [key for key in ("weight", "epochs", "token_share") if getattr(self, key) is not None]
        if len(shares) > 1:
            raise ValueError(f"'{shares[0]}' and '{shares[1]}' exclude each other")
        if (self.prompt_field is None) != (self.completion_field is None):
            raise ValueError("'prompt_field' and 'completion_field' go together")
        if self.messages_field is not None and (self.prompt_field or self._marks_entities):
            raise ValueError("'messages_field' excludes 'prompt_field' and entities")
        if self.messages_field is not None and self.leading_space:
            raise ValueError(
                "'messages_field' excludes 'leading_space': the chat template writes what a text begins with"
            )
        if (self.messages_field or self.prompt_field) and self._says("text_field"):
            raise ValueError(
                "'text_field' excludes 'prompt_field' and 'messages_field': one of them makes the text"
            )
        return self

    @model_validator(mode="after")
    def _reading_options_belong_to_files(self) -> SourceSpec:
        idle = [key for key in _READING_OPTIONS if self._says(key)]
        if idle and self.files is None:
            raise ValueError(
                f"{idle} set how 'files' are read; a store, sampled text or the embedded task is read as it is"
            )
        policy = [key for key in ("add_bos", "add_eos") if self._says(key)]
        if policy and (self.store is not None or self.sampled is not None):
            raise ValueError(f"{policy} set how texts are tokenized; a store has what it was prepared with")
        return self

    @model_validator(mode="after")
    def _entities_are_marked_in_one_way(self) -> SourceSpec:
        if self.entities_pattern is None:
            return self
        if self.entities_field is not None:
            raise ValueError("'entities_field' and 'entities_pattern' exclude each other")
        if not self.entities_pattern:
            raise ValueError(
                "'entities_pattern' is empty, and marks nothing: leave it out, or give a pattern"
            )
        try:
            re.compile(self.entities_pattern)
        except re.error as error:
            raise ValueError(f"'entities_pattern' is no regular expression: {error}") from None
        return self

    @model_validator(mode="after")
    def _derived_texts_have_what_they_are_made_of(self) -> SourceSpec:
        if self.derive is None or self.facts is not None:
            return self
        if self.files is None:
            raise ValueError(
                "'derive' makes texts of 'files' or 'facts'; a store or sampled text is read as it is"
            )
        if self.messages_field is not None:
            raise ValueError("'derive' makes no texts of chats ('messages_field')")
        if not self._marks_entities and (self.derive == "identity_bridge" or self.prompt_field is None):
            other = " (or 'prompt_field' and 'completion_field')" if self.derive == "other_order" else ""
            raise ValueError(
                f"'derive: {self.derive}' needs to know the entities: give 'entities_field' or 'entities_pattern'{other}"
            )
        return self

    @property
    def default_name(self) -> str:
        """What a source without a name is called."""
        if self.sampled is not None:
            return "sampled"
        path = self.store or (self.files[0] if self.files else f"facts_{self.facts}")
        name = PurePath(str(path)).name
        return f"{name}_{self.derive}" if self.derive else name

    @property
    def _marks_entities(self) -> bool:
        return self.entities_field is not None or self.entities_pattern is not None

    def _says(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default


class DataSpec(Section):
    """What is read, and how it is packed."""

    sources: Annotated[list[SourceSpec], Field(min_length=1)] = Field(
        description="the texts, one entry per store, set of files, or part of the embedded task; how they are mixed, too",
        examples=[[{"store": "stores/mine"}]],
    )
    facts: FactsSpec = FactsSpec()
    cache_dir: LocalPath = Field(
        LocalPath("runs/data"),
        description="where stores made from 'files' and 'facts' are kept, and the pack plans of large data sets",
        examples=["~/stores"],
    )
    capacity: Annotated[
        int,
        Bound(
            least=2,
            most=2**24,
            why="a bin goes through the model at once, and a text of one token has no next one",
        ),
    ] = Field(
        2048,
        description="tokens per bin, after an objective has expanded the documents; NTP and BICO expand none",
        examples=[4096],
    )
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split", description="documents longer than a bin are split into pieces, truncated, or dropped"
    )
    max_documents_per_bin: (
        Annotated[int, Bound(least=1, most=2**31 - 1, why="documents of a bin are counted by 32-bit numbers")]
        | None
    ) = Field(
        None,
        description="documents that share a bin; 1: every document has its own; null: as many as fit",
        examples=[1],
    )
    repack_every_epoch: bool = Field(
        False, description="choose anew in every epoch, by the seed, which documents share a bin"
    )
    workers: Annotated[
        int, Bound(least=0, most=1024, why="each is a thread of every rank, two steps ahead")
    ] = Field(1, description="background batch builders per rank; 0: none", examples=[2])
    allow_change: bool = Field(False, description="resume although the data set or recipe changed")

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> DataSpec:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give 'weight' to every source or to none")
        return self

    def source_numbers(self, names: list[str] | None) -> tuple[int, ...]:
        """The numbers of the sources of these names, which are all in `source_names`; None: all sources."""
        known = self.source_names
        return tuple(number for number, name in enumerate(known) if names is None or name in names)

    @property
    def source_names(self) -> list[str]:
        """The sources' names in logs: their own, or the last part of their path; made unique."""
        return unique_names(source.name or source.default_name for source in self.sources)
