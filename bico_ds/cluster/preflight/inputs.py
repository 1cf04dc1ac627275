"""What a run reads from disk: where it is, and whether it is the same on every node. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bico_ds.cluster.offline import cached_model, cached_tokenizer, is_offline
from bico_ds.common.errors import UserError
from bico_ds.config.imports import source_files
from bico_ds.config.load import dump_recipe
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.evaluation import QuestionFileSpec
from bico_ds.config.sections.held_out import HeldOutTaskSpec
from bico_ds.data.prepare.input_files import find_files
from bico_ds.data.store import TokenStore
from bico_ds.runtime.run_folder import RunFolder

_READ_BYTES = 1 << 20  # read from the beginning and from the end of a file
PACKAGE = Path(__file__).resolve().parents[2]


def input_files(recipe: Recipe, *, offline: bool = False) -> Iterator[tuple[str, Callable[[], list[Path]]]]:
    """Recipe key with its value, and how to find the files or folders that must be there before the run.

    `offline`: what has a name on the hub must be in its cache. Finding raises `UserError` where there are none. A path that
    cannot be expanded on this machine raises it at once.
    """
    for number, name in enumerate(recipe.imports):
        yield f"imports.{number} ({name})", partial(source_files, name)
    for key, value in (("model.path", recipe.model.path), ("model.tokenizer", recipe.model.tokenizer)):
        if value is None:
            continue
        local = value.here()
        if key == "model.path" and recipe.model.tokenizer is None and offline and not isinstance(local, Path):
            yield f"{key} ({value}), tokenizer", partial(cached_tokenizer, local)
        if isinstance(local, Path):
            yield f"{key} ({value})", partial(_existing, local, _advice(local))
        elif offline:
            cached = cached_model if key == "model.path" else cached_tokenizer
            yield f"{key} ({value})", partial(cached, local)
    for number, source in enumerate(recipe.data.sources):
        if source.store is not None:
            yield f"data.sources.{number}.store ({source.store})", partial(_existing, source.store.here())
        for given in source.files or []:
            yield f"data.sources.{number}.files ({given})", partial(find_files, [given.expanded()])
    if (folder := recipe.evaluation.folder) is not None and recipe.evaluation.reversal_tasks:
        yield f"evaluation.folder ({folder})", partial(_existing, folder.here())
    for number, task in enumerate(recipe.evaluation.tasks):
        if isinstance(task, QuestionFileSpec):
            yield f"evaluation.tasks.{number}.file ({task.file})", partial(_existing, task.file.here())
        elif isinstance(task, HeldOutTaskSpec):
            yield f"evaluation.tasks.{number}.store ({task.store})", partial(_existing, task.store.here())


def shared_folders(recipe: Recipe, run: Path) -> list[Path]:
    """Folders that one rank writes and all read: the run folder, and that of the stores which rank 0 makes.

    A folder of checkpoints that is a link may be on another disk, which may not be mounted on every node.
    """
    checkpoints = RunFolder(run).checkpoints
    folders = [run, checkpoints] if checkpoints.is_symlink() else [run]
    made_here = any(source.store is None for source in recipe.data.sources)
    return [*folders, recipe.data.cache_dir.here()] if made_here else folders


def missing_inputs(recipe: Recipe, *, offline: bool = False) -> Iterator[str]:
    """What is not on this machine, as a message that begins with the recipe's key. Raises `UserError` as `input_files`.

    `offline`: the run has no network, whatever this process has.
    """
    for key, find in input_files(recipe, offline=offline or is_offline()):
        try:
            find()
        except UserError as error:
            yield f"{key}: {error}"


def input_fingerprints(recipe: Recipe) -> dict[str, str]:
    """A digest for every input (`files_digest`), by key and path; `missing` where it is not on this machine."""
    return {key: _digest_or_missing(find) for key, find in input_files(recipe, offline=is_offline())}


def damaged_stores(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the stores that are on this machine, as a message that begins with the recipe's key.

    Their checksums are left to the start of training, which may take as long as it needs: nobody waits for a pre-flight.
    """
    for number, source in enumerate(recipe.data.sources):
        if source.store is not None and source.store.here().exists():
            try:
                TokenStore.open(source.store.here(), verify="structure")
            except UserError as error:
                yield f"data.sources.{number}.store: {error}"


def code_fingerprint() -> str:
    """Digest of this package's source files, so that a node with another checkout is noticed."""
    return files_digest(sorted(PACKAGE.rglob("*.py")), root=PACKAGE)


def recipe_fingerprint(recipe: Recipe) -> str:
    """Digest of the resolved recipe, defaults included."""
    return hashlib.blake2b(dump_recipe(recipe).encode(), digest_size=8).hexdigest()


def _advice(model: Path) -> str:
    if model == RunFolder(model.parent).export:
        return "a run exports it at its end: train that one first, or give another model"
    return "fetch it there, or give a hub name (owner/name)"


def _existing(path: Path, advice: str = "correct the path, or prepare it first") -> list[Path]:
    if not path.exists():
        raise UserError(f"not there; {advice}")
    return [path]


def _digest_or_missing(find: Callable[[], list[Path]]) -> str:
    try:
        return files_digest(find())
    except UserError:
        return "missing"


def files_digest(paths: list[Path], *, root: Path | None = None) -> str:
    """Digest of names, sizes and contents of files, and of all files below folders; of files over 2 MiB only both ends."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(root or path.parent)
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            digest.update(_ends(file))
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(_READ_BYTES)
        size = path.stat().st_size
        if size <= _READ_BYTES:
            return start
        file.seek(max(_READ_BYTES, size - _READ_BYTES))
        return start + file.read()
