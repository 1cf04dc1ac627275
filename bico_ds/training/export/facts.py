"""What is known of exported weights: the record in their checkpoint, and what the run's folder holds of that step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError
from bico_ds.config.schema import Recipe
from bico_ds.config.unique_names import unique_names
from bico_ds.data.store import TokenStore
from bico_ds.evaluation.results import EvaluationResult, load_result
from bico_ds.planner.architecture import Architecture, architecture_of
from bico_ds.planner.flops import useful_flops
from bico_ds.runtime.run_folder import EVALUATION, RunFolder, read_starts


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """Of the weights of one checkpoint.

    `record`: the content of its manifest. `recipe`: the run's, of which only the record has the objectives for sure: they
    may need code that is gone. `start`: what run.json says of the start that wrote it. `evaluation`: the result
    of that step, None where there is none, for `no_evaluation`.
    """

    record: Mapping[str, Any]
    recipe: Recipe
    start: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationResult | None = None
    no_evaluation: str = ""

    @property
    def step(self) -> int:
        return int(self.record["step"])

    @property
    def base(self) -> str | None:
        """The fingerprint of the weights that the run began with; None where none is recorded."""
        return self.record.get("base")

    @property
    def objectives(self) -> dict[str, dict[str, Any]]:
        """The recipe's objectives by their names in logs."""
        given = self.record["recipe"]["objectives"]
        return dict(zip(unique_names(spec["kind"] for spec in given), given, strict=True))

    @property
    def probabilities(self) -> list[float]:
        """Of each objective in a step."""
        loader = self.record["state"].get("loader", {})
        return loader.get("step_probabilities") or [float(x["probability"]) for x in self.objectives.values()]

    @property
    def work(self) -> dict[str, dict[str, Any]]:
        """By objective, what its steps have done since step 0; empty where the run does not know."""
        return dict(self.record["state"].get("callbacks", {}).get("work", {}))

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What `sources_record` recorded; of earlier versions the fingerprints alone."""
        if recorded := self.record.get("export", {}).get("sources"):
            return list(recorded)
        identity = self.record["state"].get("loader", {}).get("identity", {})
        return [
            {"name": name, "fingerprint": identity.get(f"data.sources[{number}] contents")}
            for number, name in enumerate(self.recipe.data.source_names)
        ]

    @property
    def texts_before(self) -> Mapping[str, Mapping[str, Any]]:
        """The perplexities before training, by the name of a text."""
        return self.record["state"].get("texts_before", {})

    def flops(self, config: Mapping[str, Any]) -> dict[str, float]:
        """The useful FLOPs of each objective's steps, of all ranks, for a model of this config.json."""
        try:
            architecture = architecture_of(config, source="config.json")
        except UserError:
            return {}
        return {name: self._flops(architecture, done) for name, done in self.work.items()}

    def _flops(self, architecture: Architecture, done: Mapping[str, Any]) -> float:
        rows, targets, pairs = (float(done.get(what, 0)) for what in ("rows", "targets", "pairs"))
        return useful_flops(architecture, self.recipe.model, rows=rows, targets=targets, pairs=pairs)


def facts_of(record: Mapping[str, Any], recipe: Recipe, folder: RunFolder | None) -> ExportFacts:
    """The facts of a checkpoint of this record; `folder`: its run's, None where it lies in none.

    What cannot be read in that folder is none of them, and no error.
    """
    if folder is None:
        return ExportFacts(
            record=record, recipe=recipe, no_evaluation="the run's folder was not beside the checkpoint"
        )
    step, result, why = int(record["step"]), None, ""
    file = folder.evaluation_file(step)
    if file.is_file():
        try:
            result = load_result(file)
        except UserError:
            why = f"the evaluation of step {step} cannot be read"
    else:
        others = [of for of, _ in EVALUATION.in_folder(folder.evaluation) if of > 0]
        shown = f" (the run's evaluations are of steps {_listed(others)})" if others else ""
        why = f"the run was not evaluated at step {step}{shown}"
    start = _start(folder, record.get("run_id"))
    return ExportFacts(record=record, recipe=recipe, start=start, evaluation=result, no_evaluation=why)


def run_of(checkpoint: Path) -> RunFolder | None:
    """The folder of the run whose checkpoint this is; None for a copy elsewhere."""
    root = checkpoint.absolute().parent
    folder = RunFolder(root.parent)
    return folder if root.name == folder.checkpoints.name and folder.recipe_file.is_file() else None


def sources_record(recipe: Recipe, stores: Sequence[TokenStore]) -> list[dict[str, Any]]:
    """Of each data source, for a checkpoint's manifest: its name, how much it has, and the fingerprint of its contents."""
    return [
        {
            "name": name,
            "documents": len(store),
            "tokens": store.manifest.tokens,
            "fingerprint": store.fingerprint,
        }
        for name, store in zip(recipe.data.source_names, stores, strict=True)
    ]


def _start(folder: RunFolder, run_id: Any) -> Mapping[str, Any]:
    try:
        starts = read_starts(folder.run_file)
    except JsonError:
        return {}
    return next((start for start in reversed(starts) if start.get("run_id") == run_id), {})


def _listed(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps[:5]]
    return ", ".join(shown) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
