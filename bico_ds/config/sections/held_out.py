"""The recipe's keys of a held-out token store, whose loss is measured during training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bico_ds.config.paths import LocalPath
from bico_ds.config.section import PositiveInt, Section

# Of an entry of `evaluation.tasks`: a part of tags, keys and names of files.
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class HeldOutTaskSpec(Section):
    """Held-out texts: the mean loss of NTP and of each of the run's objectives, with masks that are always the same."""

    kind: Literal["held_out"] = Field("held_out", description="a held-out store, whose loss is measured")
    name: EntryName = Field(description="of the store in tags and result files", examples=["facts"])
    store: LocalPath = Field(
        description="a token store that is not trained on, as `bico-ds prepare` writes one with --held-out",
        examples=["stores/mine/held_out"],
    )
    limit: PositiveInt | None = Field(
        None,
        description="only so many documents, spread evenly over the store; null: all of them",
        examples=[500],
    )
