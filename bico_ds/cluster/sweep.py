"""A sweep: the runs of a grid, each in a folder named by its values; sweep.json beside them tells which is which.

runs/sweep-NAME/
  sweep.json                     every run that a command has begun here, with its values
  recipes/NAME+seed=1.yaml       the resolved recipe of each: what is edited meanwhile does not reach runs that wait
  NAME+seed=1/                   a run folder

No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.common.printable import on_one_line
from bico_ds.common.yaml_files import KeyPath, MappingFile, read_mapping
from bico_ds.config.grid import Axis, Point, points
from bico_ds.config.layers import leaves, named_key, value_at
from bico_ds.config.load import dump_recipe, read_recipe, recorded_recipe, recorded_values
from bico_ds.config.schema import Recipe
from bico_ds.runtime.run_folder import RunFolder, read_state

SWEEP_FILE = "sweep.json"
_RECIPES = "recipes"
# What of a recipe may be other than in a run which is there: nothing that is learnt or measured depends on it.
_FREE = {"description", "output_dir", "monitor", "distributed"}
_UNNAMED = {"name": "x", "description": "", "output_dir": None}
_MOST_SHOWN, _MOST_LISTED = 60, 5


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A run of a sweep. `values`: those that its recipe has from the grid, by key."""

    name: str
    recipe: Recipe = field(repr=False)
    values: Mapping[str, Any]


def sweep_folder(chosen: Path | None, runs: Sequence[SweptRun]) -> Path:
    """The folder `chosen` on the command line, else runs/sweep-NAME of the first recipe."""
    return chosen or Path("runs", f"sweep-{runs[0].recipe.name}")


def list_sweep(recipes: Sequence[str], overrides: Sequence[str], axes: Sequence[Axis]) -> list[SweptRun]:
    """The runs of every recipe at every point of the grid. `overrides` are those of `--set`; the grid lies over them.

    Raises `UserError` as `load_recipe` does, with the name of the run, and where two runs would be the same.
    """
    runs = []
    for source in recipes:
        for point in points(axes):
            try:
                recipe, tree = read_recipe(source, [*overrides, *point.overrides])
            except UserError as error:
                message, at = str(error), [f"--grid {override}" for override in point.overrides]
                for override, shown in zip(point.overrides, at, strict=True):
                    message = message.replace(f"--set {override}", shown)
                if not any(
                    shown in message for shown in (*at, "--set ")
                ):  # a collision of what is right alone
                    message = f"{' '.join(at)}: {message}"
                raise UserError(message) from None
            _refuse_overwritten(point, tree)
            runs.append(SweptRun(name=point.name_of_run(recipe.name), recipe=recipe, values=point.values))
    _refuse_twins(runs)
    return runs


def _refuse_overwritten(point: Point, tree: MappingFile) -> None:
    """Raise `UserError` where a value of the point is not in its recipe: the run's name would tell what is not so."""
    for key, value in point.values.items():
        try:
            found = value_at(named_key(tree, key.removesuffix("+"), key), tree.values)
        except UserError:  # an entry that another key has taken away
            found = None
        if not key.endswith("+") and not _has(found, value):
            others = ", ".join(other for other in point.values if other != key)
            raise UserError(
                f"--grid {key}: overwritten by another key of the grid ({others}), so that the names of runs would tell "
                "what is not so; leave one of them out, or write both as one mapping"
            )


def _has(found: Any, value: Any) -> bool:
    """Whether all that is in `value` is in what was found; keys beside those of a mapping may be there, too."""
    if isinstance(value, dict) and isinstance(found, dict):
        return all(name in found and _has(found[name], inner) for name, inner in value.items())
    return bool(found == value)


def _refuse_twins(runs: Sequence[SweptRun]) -> None:
    """By other names, or other keys that overwrite one another, two points may be one, and so may two recipes."""
    names: dict[str, SweptRun] = {}
    recipes: dict[str, SweptRun] = {}
    for run in runs:
        if run.name in names:
            raise UserError(
                f"--recipe, --grid: two runs of this sweep would have the same folder, '{run.name}'"
            )
        other = recipes.get(recipe := dump_recipe(run.recipe.model_copy(update=_UNNAMED)))
        if other is not None:
            raise UserError(
                f"--recipe, --grid: the runs '{other.name}' and '{run.name}' would be the same: their recipes do not differ "
                "but in names, for two of the values mean one thing, or one key overwrites the other"
            )
        names[run.name] = recipes[recipe] = run


def refuse_changed(folder: Path, runs: Sequence[SweptRun]) -> None:
    """Raise `UserError` where a run's folder holds one of another recipe: going on would mix the two, and passing over a
    finished one would show it under values that it was not trained with.
    """
    for run in runs:
        file = folder / run.name / "recipe.yaml"
        if not file.is_file():
            continue
        changed = _differences(_values_in(file), recorded_values(run.recipe))
        if changed:
            more = len(changed) - _MOST_LISTED
            shown = [*changed[:_MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise UserError(
                f"'{folder / run.name}' holds a run of another recipe: {'; '.join(shown)}. Choose another folder with "
                "--output-dir, or move that run away"
            )


def _values_in(file: Path) -> dict[str, Any]:
    """A run's recipe, with the defaults of keys that are newer than it."""
    values = read_mapping(file, "the recipe of a run is a mapping of keys").values
    try:
        return recorded_values(recorded_recipe(values, file))
    except UserError:  # it has keys that are gone, or objectives of modules that are not loaded
        return values


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`KEY was X and is Y`, of the keys that matter."""
    old, new = ({leaf.key: leaf for leaf in leaves(values)} for values in (before, now))
    found = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = _value(key, old), _value(key, new)
        if key[0] not in _FREE and was != is_now:
            path = (new.get(key) or old[key]).path
            found.append(f"{path} was {was}, and is {is_now} now")
    return found


def _value(key: KeyPath, leaves_by_key: Mapping[KeyPath, Any]) -> str:
    leaf = leaves_by_key.get(key)
    return "not there" if leaf is None else on_one_line(json.dumps(leaf.value), most=_MOST_SHOWN)


def is_done(run: Path) -> bool:
    """Whether the folder holds a finished run, and its recipe, which `refuse_changed` has looked at."""
    folder = RunFolder(run)
    return folder.recipe_file.is_file() and (read_state(folder.state_file) or {}).get("state") == "done"


def recipe_file(folder: Path, run: SweptRun) -> Path:
    """Where `write_sweep` keeps the run's recipe."""
    return folder / _RECIPES / f"{run.name}.yaml"


def refuse_rewritten(folder: Path, run: SweptRun) -> None:
    """Raise `UserError` where another sweep has come to this folder with another recipe for the run, since `write_sweep`."""
    file = recipe_file(folder, run)
    if not file.is_file() or file.read_bytes() != dump_recipe(run.recipe).encode():
        raise UserError(
            f"'{file}' is no longer the recipe that this sweep has for it: another one was begun in this folder. Let that "
            "one end, or choose another --output-dir"
        )
    refuse_changed(folder, [run])


def write_sweep(folder: Path, runs: Sequence[SweptRun]) -> None:
    """Write sweep.json, in which runs of earlier commands stay, and the recipes.

    Raises `UserError` where the folder cannot be written, and for a sweep.json that is none.
    """
    known = read_sweep(folder)
    known |= {run.name: {"recipe": run.recipe.name, "values": dict(run.values)} for run in runs}
    try:
        (folder / _RECIPES).mkdir(parents=True, exist_ok=True)
        for run in runs:
            write_atomically(recipe_file(folder, run), dump_recipe(run.recipe))
        write_atomically(folder / SWEEP_FILE, json.dumps({"runs": known}, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--output-dir: cannot write '{error.filename or folder}': {error.strerror}; choose another folder"
        ) from None


def read_sweep(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in a folder's sweep.json by name, each with `recipe`, a name, and `values` by key; none where there is no
    such file. Raises `UserError` for one that holds anything else.
    """
    file = folder / SWEEP_FILE
    try:
        runs = read_object(file).get("runs")
    except JsonError as error:
        if error.is_missing:
            return {}
        raise UserError(f"{error}; move it away") from None
    fits = isinstance(runs, dict) and all(
        isinstance(run, dict) and isinstance(run.get("recipe"), str) and isinstance(run.get("values"), dict)
        for run in runs.values()
    )
    if not fits:
        raise UserError(f"{file}: it does not list the runs of a sweep; move it away")
    assert isinstance(runs, dict)
    return runs
