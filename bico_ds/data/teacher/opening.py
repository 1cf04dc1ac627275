"""The teacher that a recipe names: opened, and refused where it is not of this run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.data.store import TokenStore, Verify
from bico_ds.data.teacher.stored import StoredTeacher, TeacherKey
from bico_ds.model.architecture import model_config
from bico_ds.model.weights.load import open_weights
from bico_ds.model.weights.sampled_fingerprint import sampled_fingerprint


def open_teachers(
    recipe: Recipe, stores: Sequence[TokenStore], *, verify: Verify, weights_needed: bool = True
) -> dict[int, StoredTeacher]:
    """The stored distributions over each source whose rows are compared, by the source's number; empty without a teacher.

    `stores`: of all sources, in order. Without `weights_needed` (dry runs), a start model that is not on this machine is not
    compared. Raises `UserError` where a store has none, where one is damaged, and where it was made of another model, for
    another `data.capacity` or `data.overlong`, or with fewer tokens per row than another.
    """
    if recipe.retention is None or recipe.retention.teacher is None:
        return {}
    folder, names = recipe.retention.teacher.here(), recipe.data.source_names
    model = _start_model(recipe, weights_needed)
    teachers: dict[int, StoredTeacher] = {}
    for source in compared_sources(recipe):
        try:
            teachers[source] = StoredTeacher.open(folder, stores[source], verify=verify)
        except UserError as error:
            command = f"bico-ds prepare teacher --store {stores[source].path} {_options(recipe)}"
            raise UserError(
                f"retention.teacher, source '{names[source]}': {error}. Make it by  {command}"
            ) from None
        differences = list(_differences(teachers[source].manifest.key, recipe, model))
        if differences:
            made_of = teachers[source].manifest.model_name
            raise UserError(
                f"retention.teacher: '{folder}' was not made for this run. Of source '{names[source]}' it has "
                + "; ".join(differences)
                + f". It was made of {made_of}; make another by  bico-ds prepare teacher --store {stores[source].path} "
                + _options(recipe)
            )
    _require_equal_sizes(teachers, names)
    return teachers


def compared_sources(recipe: Recipe) -> list[int]:
    """The numbers of the sources of `retention.on` that a causal objective draws from."""
    assert recipe.retention is not None
    causal = [spec.sources for spec in recipe.objectives if spec.attention == "causal"]
    drawn = {number for names in causal for number in recipe.data.source_numbers(names)}
    return sorted(drawn & set(recipe.data.source_numbers(recipe.retention.on)))


def _start_model(recipe: Recipe, weights_needed: bool) -> str | None:
    """The fingerprint of the start model; None where it is not here, and need not be."""
    path = recipe.model.path
    if path is None:
        raise UserError("retention.teacher: a model of random weights (model.path: null) has no teacher")
    if not weights_needed and not path.is_here():
        return None
    weights = open_weights(path.here(), allow_pickle=recipe.model.allow_pickle)
    return sampled_fingerprint(model_config(recipe.model), weights)


def _differences(key: TeacherKey, recipe: Recipe, model: str | None) -> Iterator[str]:
    data = recipe.data
    if key.capacity != data.capacity:
        yield f"pieces of {key.capacity} tokens, and data.capacity is {data.capacity}"
    if key.overlong != data.overlong:
        yield f"overlong documents by '{key.overlong}', and data.overlong is '{data.overlong}'"
    if model is not None and key.model != model:
        yield f"the distributions of model {key.model}, and model.path '{recipe.model.path}' is {model}"


def _options(recipe: Recipe) -> str:
    assert recipe.retention is not None
    return (
        f"--model {recipe.model.path} --capacity {recipe.data.capacity} --overlong {recipe.data.overlong} "
        f"--output {recipe.retention.teacher}"
    )


def _require_equal_sizes(teachers: dict[int, StoredTeacher], names: list[str]) -> None:
    sizes = {names[source]: teacher.manifest.key.top_k for source, teacher in teachers.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} of '{name}'" for name, size in sizes.items())
        raise UserError(
            f"retention.teacher: all sources need equally many tokens per row (--top-k); found {found}"
        )
