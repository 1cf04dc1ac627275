"""The tasks that a recipe's `evaluation.tasks` asks: name-description ones by their names, and the user's own files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bico_ds.common.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.evaluation import EvaluationSpec, QuestionFileSpec
from bico_ds.data.prepare.recipe_sources import facts_folder
from bico_ds.evaluation.tasks.further_sets import READERS
from bico_ds.evaluation.tasks.task import Task, load_tasks, task_file


def check_questions(recipe: Recipe) -> None:
    """Raise `UserError` for a task of no known name, and for what is wrong with the user's files.

    It is cheap, so that it can come before what is not. Files of name-description tasks are not read: those of the embedded
    task may have to be made first.
    """
    spec = recipe.evaluation
    for name in spec.reversal_tasks:
        task_file(spec.folder.here() if spec.folder is not None else recipe.data.cache_dir.here(), name)
    for own in spec.question_files:
        tasks_of_file(own, spec)


def tasks_of_recipe(recipe: Recipe) -> list[Task]:
    """All tasks, in the order of the recipe, with as many questions as its limits say.

    Raises `UserError` as `load_tasks` does, and for a malformed file of the user's, with the place of it in the recipe.
    """
    spec = recipe.evaluation
    known: Iterator[Task] = iter(())
    if spec.reversal_tasks:
        folder = spec.folder.here() if spec.folder is not None else facts_folder(recipe.data)
        known = iter(load_tasks(folder, spec.reversal_tasks, limit=spec.limit))
    tasks: list[Task] = []
    for entry in spec.tasks:
        if isinstance(entry, str):
            tasks.append(next(known))
        elif isinstance(entry, QuestionFileSpec):
            tasks += tasks_of_file(entry, spec)
    return tasks


def tasks_of_file(own: QuestionFileSpec, spec: EvaluationSpec) -> list[Task]:
    """The tasks of a file of the user's, one per direction. Raises `UserError`."""
    path = own.file.here()
    try:
        tasks = READERS[own.kind](path, own.limit if own.limit is not None else spec.limit)
    except (UserError, OSError) as error:
        reason = (
            error if isinstance(error, UserError) else f"{path}: cannot be read: {error.strerror or error}"
        )
        raise UserError(f"{own.file.where or 'evaluation.tasks'} ({own.name}): {reason}") from None
    return [
        replace(task, name=name, metric=own.metric) for task, name in zip(tasks, own.task_names, strict=True)
    ]
