"""What an export carries for whoever gets it: the model card, and the papers of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.schema import Recipe
from bico_ds.model.weights.blend import Blend
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.export.base_papers import CARD, BasePapers, papers_of
from bico_ds.training.export.card import Kind, card_text, missing_papers
from bico_ds.training.export.facts import ExportFacts, facts_of

_CONFIG = "config.json"


@dataclass(frozen=True)
class ExportCard:
    """The card of exports of one checkpoint. `facts` and `base` are read once, whatever is exported of it."""

    facts: ExportFacts
    base: BasePapers | None

    def write(self, folder: Path, *, kind: Kind = "model", blend: Blend | None = None) -> None:
        """Write README.md, and the licences of the base, into a folder that has its weights. Raises OSError.

        Call it before `write_checksums`, which is to cover these files, and before the folder is published.
        """
        if self.base is not None:
            self.base.write(folder)
        text = card_text(self.facts, self.base, self._config(folder), kind=kind, blend=blend)
        (folder / CARD).write_text(text, encoding="utf-8")

    @cached_property
    def notes(self) -> list[str]:
        """What whoever passes the export on must know, a line each."""
        if self.base is None:
            return []
        name = self.facts.recipe.name
        notes = [
            f"{licence.name}: the name of a model made from it must begin with '{licence.prefix}', and '{name}' does not: "
            f"pass it on as '{licence.suggested(name)}'"
            for licence in self.base.licences
            if not licence.allows_name(name)
        ]
        return notes + missing_papers(self.base)

    def _config(self, folder: Path) -> Mapping[str, Any]:
        """The model's config.json: an adapter's folder has none, and its base may not be here."""
        for place in (folder, self.base.folder if self.base is not None else None):
            try:
                if place is not None:
                    return read_object(place / _CONFIG, strict=False)
            except JsonError:
                continue
        return self.facts.recipe.model.config or {}


def card_of(record: Mapping[str, Any], recipe: Recipe, folder: RunFolder | None) -> ExportCard:
    """The card of a checkpoint with this manifest.

    `recipe`: the run's, whose `model.path` says where the base is now. `folder`: the run's, None where the checkpoint lies
    in none.
    """
    path = recipe.model.path
    return ExportCard(facts_of(record, recipe, folder), None if path is None else papers_of(path))
