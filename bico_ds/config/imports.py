"""A recipe's `imports`: the user's own modules, loaded before the recipe is validated.

Every rank loads them, and every command that takes a recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from bico_ds.common.errors import UserError
from bico_ds.config.paths import WrittenPath

# Names of version 0.1.0 that an objective of a user's own imports, as Python's error quotes them.
_MOVED = {
    "'Documents' from 'bico_ds.batch'": "it is in bico_ds.documents now",
    "'Document' from 'bico_ds.batch'": "it is in bico_ds.documents now",
    "'TokenFacts' from 'bico_ds.objectives.base'": "it is TokenRoles now",
    "'bico_ds.config.errors'": "it is bico_ds.common.errors now",
    "'bico_ds.objectives.counter'": "it is bico_ds.common.random_numbers now",
}


def import_module(written: WrittenPath, *, recipe_folder: Path | None = None) -> ModuleType:
    """Import a module by its name, or a Python file by its path (it ends in `.py`); once per process.

    A path begins at the working directory, as all paths do.

    Raises `UserError`, with the line of the recipe, where the module is missing or fails (with the line at which it fails).
    Where a file is missing and `recipe_folder` has one of that name, the error names it.
    """
    name = written.expanded()
    try:
        return (
            _import_file(Path(name), recipe_folder) if name.endswith(".py") else importlib.import_module(name)
        )
    except UserError as error:
        raise UserError(f"{written.where}: {error}") from error.__cause__
    except ModuleNotFoundError as error:
        is_itself = name == error.name or name.startswith(f"{error.name}.")
        if name.endswith(".py") or not is_itself:
            raise UserError(f"{written.where}: {_describe(name, error)}") from error
        raise UserError(
            f"{written.where}: there is no module '{name}' here; install it, or name a file that ends in .py"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{written.where}: {_describe(name, error)}") from error


def source_files(written: WrittenPath) -> list[Path]:
    """The Python files behind an import, all of them for a package: what must be the same on every node.

    Raises `UserError` where the module is missing, or fails.
    """
    file = import_module(written).__file__
    if file is None:
        raise UserError(f"{written.where}: '{written}' has no file of its own")
    is_package = Path(file).name == "__init__.py"
    return sorted(Path(file).parent.rglob("*.py")) if is_package else [Path(file)]


def _import_file(path: Path, recipe_folder: Path | None) -> ModuleType:
    if not path.is_file():
        raise UserError(_describe_missing(path, recipe_folder))
    file = path.resolve()
    stem = re.sub(r"\W", "_", file.stem)  # a dot or colon would have a meaning in a module's name
    name = f"{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _describe_missing(path: Path, recipe_folder: Path | None) -> str:
    if path.is_absolute():
        return f"there is no file '{path}'"
    missing = f"there is no file '{path}' in the working directory, '{Path.cwd()}'"
    if recipe_folder is None or not (meant := recipe_folder / path).is_file():
        return missing
    return f"{missing}; there is one beside the recipe: write '{meant}'"


def _describe(name: str, error: BaseException) -> str:
    """The error and its line in the user's own module, as one line."""
    if isinstance(error, SyntaxError):
        return f"'{name}' does not parse: {error.filename}:{error.lineno}: {error.msg}"
    frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    theirs = [frame for frame in frames if not frame.startswith(("<frozen", importlib.__file__, __file__))]
    at = f" at {theirs[-1]}" if theirs else ""
    moved = next((f"; {hint}" for old, hint in _MOVED.items() if old in str(error)), "")
    return f"'{name}' fails{at}: {type(error).__name__}: {error}{moved if isinstance(error, ImportError) else ''}"
