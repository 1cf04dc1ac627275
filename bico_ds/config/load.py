"""From a recipe's name to a validated `Recipe`: YAML with `extends:`, dotted overrides, errors with file and line."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.printable import on_one_line
from bico_ds.common.secrets import left_out_keys, text_without_secrets, without_secrets
from bico_ds.common.yaml_files import KeyPath, MappingFile, Origin, dotted, dump_yaml, read_mapping
from bico_ds.config.bounds import shown
from bico_ds.config.imports import import_module
from bico_ds.config.layers import apply_override, is_override, merge_files, value_at
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS
from bico_ds.config.paths import LocalPath, WrittenPath
from bico_ds.config.resources import RECIPES
from bico_ds.config.schema import Recipe

_MOST_EXTENDED = 20
# Layers of a recipe: what it extends, itself, overrides.
_INHERITED, _TOP, _OVERRIDES = range(3)
_MOST_PROBLEMS, _MOST_SHOWN = 20, 100


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load, merge and validate a recipe.

    `name_or_path` is a name in recipes/ or a YAML file; `overrides` are `key.path=value` with YAML values. The recipe's
    `imports` are loaded before it is validated. Raises `UserError` that names the key and where it was written: file and
    line, or the override; also for a secret that was left out where the recipe was kept.
    """
    return read_recipe(name_or_path, overrides)[0]


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, MappingFile]:
    """`load_recipe`, and what it is made of: the values as they are written, and where each of them is set."""
    tree = _load_file(find_recipe(name_or_path))
    for override in overrides:
        apply_override(tree, override)
    tree.values.setdefault("name", Path(name_or_path).stem)
    _refuse_left_out(tree)
    _import_modules(tree)
    return _validated(tree), tree


def recorded_recipe(values: dict[str, Any], file: Path, *, objectives: bool = True) -> Recipe:
    """The recipe that `file`, a manifest, recorded. Raises `UserError` that names key and file.

    Its `imports` are not loaded: they may be gone, or have moved. Without `objectives` next-token prediction stands in
    their place, for commands that build none; then `checkpoint.keep_best`, which may go by one of them, is left out, too.
    """
    if not objectives:
        checkpoint = {**(values.get("checkpoint") or {}), "keep_best": None}
        values = {**values, "objectives": [{"kind": "ntp"}], "checkpoint": checkpoint}
    return _validated(MappingFile(values, {(): Origin(str(file), 0)}))


def find_recipe(name_or_path: str, *, beside: Path | None = None) -> Path:
    """Resolve a recipe's path or name: a file, else a name next to the file that extends it, else one in recipes/.

    Raises `UserError` where there is none.
    """
    folders = [folder for folder in (beside, RECIPES) if folder is not None]
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.yaml" for folder in folders)]
    candidates += [folder / name_or_path for folder in folders]
    problems = []
    for candidate in candidates:
        problem = _no_file(candidate)
        if problem is None:
            return candidate
        problems.append(problem)
    name = on_one_line(name_or_path, most=_MOST_SHOWN)
    if found := next((problem for problem in problems if problem), None):
        raise UserError(f"recipe '{name}' {found}; give a YAML file, or a name in {RECIPES}")
    raise UserError(
        f"recipe '{name}' is neither a file nor a name in {RECIPES}{did_you_mean(name, _names())}; "
        "`bico-ds train --list-recipes` shows all names"
    )


def _no_file(path: Path) -> str | None:
    """Why this is no file that can be opened, `""` where nothing is there; None where it is one."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"


def _names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def list_recipes() -> dict[str, str]:
    """Return the names in recipes/ with their own one-line descriptions; of one that cannot be read, the reason."""
    found = {}
    for name in _names():
        try:
            found[name] = str(
                read_mapping(RECIPES / f"{name}.yaml", "no recipe").values.get("description", "")
            )
        except UserError as error:
            found[name] = f"(cannot be read: {error})"
    return found


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every key present, secrets left out; loading it again gives the same recipe.

    Where a secret was left out it must be given anew: `load_recipe` refuses what stands there.
    """
    return dump_yaml(recorded_values(recipe))


def recorded_values(recipe: Recipe) -> dict[str, Any]:
    """Return what is kept and shown of a recipe: the values of all its keys, secrets left out."""
    kept: dict[str, Any] = without_secrets(recipe.model_dump(mode="json"))
    return kept


def _refuse_left_out(tree: MappingFile) -> None:
    """Raise `UserError` for the first value that `dump_recipe` left out; what a description says is needed by nobody."""
    for key in left_out_keys(tree.values):
        if key != ("description",):
            raise UserError(
                f"{_where(key, tree.origins)}: a secret that was left out where this recipe was kept; give it again: "
                f"--set {dotted(key)}=VALUE"
            )


def _import_modules(tree: MappingFile) -> None:
    """The user's own modules, before validation: a recipe may name objectives that only they know."""
    names = tree.values.get("imports")
    for index, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str) and name:
            key = ("imports", index)
            origin = _origin_of(key, tree.origins)
            folder = Path(origin.file).parent if origin is not None and origin.line else None
            import_module(WrittenPath(name, where=_where(key, tree.origins)), recipe_folder=folder)


def _validated(tree: MappingFile) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise UserError(_explain(error, tree)) from None
    return _with_origins(recipe, (), tree.origins)


def _with_origins(value: Any, key: KeyPath, origins: dict[KeyPath, Origin]) -> Any:
    """The same recipe; its paths know where they were written, for the errors of those who will use them."""
    if isinstance(value, WrittenPath):
        return replace(value, where=_where(key, origins))
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return value.model_copy(update=_with_origins(fields, key, origins))
    if isinstance(value, dict):
        return {name: _with_origins(inner, (*key, name), origins) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_origins(inner, (*key, index), origins) for index, inner in enumerate(value)]
    return value


def _where(key: KeyPath, origins: dict[KeyPath, Origin]) -> str:
    """`FILE:LINE: key`."""
    origin, name = _origin_of(key, origins), dotted(key) or "recipe"
    return f"{origin}: {name}" if origin else name


def _load_file(path: Path) -> MappingFile:
    """The file over those that it extends."""
    chain, files = [path], [_read(path)]
    while (base := files[-1].values.pop("extends", None)) is not None:
        where = f"{files[-1].origins[('extends',)]}: extends"
        if not isinstance(base, str):
            raise UserError(f"{where}: 'extends' must be one recipe's name or path")
        try:
            path = find_recipe(LocalPath(base, where=where).expanded(), beside=chain[-1].parent)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        chain.append(path)
        names = " -> ".join(link.name for link in chain)
        if any(os.path.samefile(path, link) for link in chain[:-1]):
            raise UserError(f"recipes extend each other in a circle: {names}")
        if len(chain) > _MOST_EXTENDED:
            raise UserError(f"{where}: more than {_MOST_EXTENDED} recipes extend each other: {names}")
        files.append(_read(path))
    tree = MappingFile({}, {})
    for file in reversed(files):
        tree = merge_files(tree, file)
    return tree


def _read(path: Path) -> MappingFile:
    return read_mapping(path, f"a recipe is a mapping of keys, as in {RECIPES / 'tiny_bico.yaml'}")


def _explain(error: ValidationError, tree: MappingFile) -> str:
    lines: dict[str, str] = {}
    problems = error.errors()
    for problem in problems[:_MOST_PROBLEMS]:
        key = _real_path(problem["loc"], tree.values)
        message, where = _message(problem, key, tree), _where(key, tree.origins)
        lines[where] = f"{lines[where]}, or: {message}" if where in lines else f"{where}: {message}"
    more = len(problems) - _MOST_PROBLEMS
    return "\n".join([*lines.values(), *([f"… and {more:,} more"] if more > 0 else [])])


def _origin_of(key: KeyPath, origins: dict[KeyPath, Origin]) -> Origin | None:
    """The line of the key itself, of something below it (a section that an override made), or of what holds it."""
    if key in origins:
        return origins[key]
    if key and (below := next((o for other, o in origins.items() if other[: len(key)] == key), None)):
        return below
    return next((origins[key[:n]] for n in range(len(key) - 1, -1, -1) if key[:n] in origins), None)


def _real_path(loc: tuple[str | int, ...], values: Any) -> KeyPath:
    """Drop the union tags that pydantic mixes into an error's location."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        known = isinstance(values, dict) and part in values
        known = known or (isinstance(values, list) and isinstance(part, int) and part < len(values))
        if known:
            path.append(part)
            values = values[part]
        elif position == len(loc) - 1 and isinstance(values, dict):
            path.append(part)
    return tuple(path)


def _message(problem: Any, key: KeyPath, tree: MappingFile) -> str:
    if problem["type"] == "extra_forbidden":
        known = list(_fields(key[:-1], tree.values))
        hint = did_you_mean(str(key[-1]), known)
        return f"unknown key{hint}; known keys here: {', '.join(known)}"
    if problem["type"] == "missing":
        return "this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return text_without_secrets(message) + _collision(message, key, tree)
    choices = (
        re.findall(r"'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    )
    hint = did_you_mean(str(problem["input"]), choices) if len(choices) > 1 else ""
    return f"{message} (found {shown(without_secrets(problem['input'], dotted(key)))}){hint}"


def _collision(message: str, section: KeyPath, tree: MappingFile) -> str:
    """Where the keys that a message names come from, if not all from one file; and how to do without an inherited one."""
    words = dict.fromkeys(re.findall(r"'([\w.]+)'", message))
    named = {key for word in words if (key := _key_named(word, section, tree)) is not None}
    beside = {key for key in tree.origins if len(key) == len(section) + 1 and key[:-1] == section}
    layers = {key: _layer(key, tree) for key in named | (beside if section else set())}
    top = max(layers.values(), default=0)
    given = [key for key in sorted(named, key=str) if value_at(key, tree.values) is not None]
    inherited = [key for key in given if layers[key] < top]
    if not inherited:
        return ""
    sources = ", ".join(
        f"'{dotted(key[len(section) :] or key)}' is from {_origin_of(key, tree.origins)}" for key in given
    )
    nulls = [_null(key, tree, by_override=top == _OVERRIDES) for key in inherited if _may_be_null(key, tree)]
    advice = f"; to do without what is inherited, write {' or '.join(nulls)}" if nulls else ""
    return f" ({sources}{advice})"


def _layer(key: KeyPath, tree: MappingFile) -> int:
    origin = _origin_of(key, tree.origins)
    if origin is None:
        return _INHERITED
    if is_override(origin):
        return _OVERRIDES
    return _TOP if origin.file == tree.origins[()].file else _INHERITED


def _key_named(word: str, section: KeyPath, tree: MappingFile) -> KeyPath | None:
    """The key that a message about a section calls `word`: one of the section's own, or one from the recipe's root."""
    parts = tuple(word.split("."))
    return next((key for key in ((*section, *parts), parts) if key in tree.origins), None)


def _null(key: KeyPath, tree: MappingFile, *, by_override: bool) -> str:
    return f"--set {dotted(key)}=null" if by_override else f"'{key[-1]}: null'"


def _may_be_null(key: KeyPath, tree: MappingFile) -> bool:
    field = _fields(key[:-1], tree.values).get(str(key[-1]))
    return field is not None and not field.is_required() and field.default is None


def _fields(section: KeyPath, values: Any) -> dict[str, FieldInfo]:
    """The keys that a section of the recipe may have."""
    models: list[type[BaseModel]] = [Recipe]
    for part in section:
        fields = [m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        values = value_at((part,), values)
        if models == [ObjectiveSpec] and isinstance(values, dict) and values.get("kind") in KINDS:
            models = [KINDS[values["kind"]].spec]
        elif len(models) > 1 and isinstance(values, dict):
            models = [model for model in models if _may_be(model, values.get("kind"))]
    return {name: field for model in models for name, field in model.model_fields.items()}


def _may_be(model: type[BaseModel], kind: Any) -> bool:
    """Whether an entry of this kind, None where it gives none, is of this model."""
    field = model.model_fields.get("kind")
    return field is None or (field.default if kind is None else kind) in get_args(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
