"""From a recipe's name to a validated `Recipe`: YAML with `extends:`, dotted overrides, errors with file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.secrets import left_out_keys, text_without_secrets, without_secrets, word_without_secrets
from bico_ds.config.imports import import_module
from bico_ds.config.objectives.base import ObjectiveSpec
from bico_ds.config.objectives.table import KINDS
from bico_ds.config.paths import LocalPath, WrittenPath
from bico_ds.config.resources import RECIPES
from bico_ds.config.schema import Recipe

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class MappingFile:
    """A plain tree of values, and where each key was written; `()` is the key of the whole file."""

    values: dict[str, Any]
    origins: dict[KeyPath, Origin]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `2e-5` as a number and the key `on` as a word, as YAML 1.2 and every reader of a recipe does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load, merge and validate a recipe.

    `name_or_path` is a name in recipes/ or a YAML file; `overrides` are `key.path=value` with YAML values. The recipe's
    `imports` are loaded before it is validated. Raises `UserError` that names the key and where it was written: file and
    line, or the override; also for a secret that was left out where the recipe was kept.
    """
    tree = _load_file(find_recipe(name_or_path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    tree.values.setdefault("name", Path(name_or_path).stem)
    _refuse_left_out(tree)
    _import_modules(tree)
    return _validated(tree)


def recorded_recipe(values: dict[str, Any], file: Path, *, objectives: bool = True) -> Recipe:
    """The recipe that `file`, a manifest, recorded. Raises `UserError` that names key and file.

    Its `imports` are not loaded: they may be gone, or have moved. Without `objectives` next-token prediction stands in
    their place, for commands that build none.
    """
    if not objectives:
        values = {**values, "objectives": [{"kind": "ntp"}]}
    return _validated(MappingFile(values, {(): Origin(str(file), 0)}))


def find_recipe(name_or_path: str, *, beside: Path | None = None) -> Path:
    """Resolve a recipe's path or name: a file, else a name next to the file that extends it, else one in recipes/.

    Raises `UserError` where there is none.
    """
    folders = [folder for folder in (beside, RECIPES) if folder is not None]
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.yaml" for folder in folders)]
    candidates += [folder / name_or_path for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    hint = did_you_mean(name_or_path, list_recipes())
    raise UserError(
        f"recipe '{name_or_path}' is neither a file nor a name in {RECIPES}{hint}; "
        "`bico-ds train --list-recipes` shows all names"
    )


def list_recipes() -> dict[str, str]:
    """Return the names in recipes/ with their own one-line descriptions."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
        found[path.stem] = str(tree.get("description", ""))
    return found


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every key present, secrets left out; loading it again gives the same recipe.

    Where a secret was left out it must be given anew: `load_recipe` refuses what stands there.
    """
    return yaml.safe_dump(recorded_values(recipe), sort_keys=False, allow_unicode=True, width=100)


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
                f"--set {_dotted(key)}=VALUE"
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
    origin, dotted = _origin_of(key, origins), _dotted(key) or "recipe"
    return f"{origin}: {dotted}" if origin else dotted


def _load_file(path: Path, *, seen: tuple[Path, ...]) -> MappingFile:
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(f"recipes extend each other in a circle: {chain}")
    tree = read_mapping(path, f"a recipe is a mapping of keys, as in {RECIPES / 'tiny_bico.yaml'}")
    base_name = tree.values.pop("extends", None)
    if base_name is None:
        return _merge(MappingFile({}, {}), tree)
    if not isinstance(base_name, str):
        raise UserError(f"{tree.origins[('extends',)]}: 'extends' must be one recipe's name or path")
    base = LocalPath(base_name, where=_where(("extends",), tree.origins)).expanded()
    try:
        base_path = find_recipe(base, beside=path.parent)
    except UserError as error:
        raise UserError(f"{tree.origins[('extends',)]}: extends: {error}") from None
    return _merge(_load_file(base_path, seen=(*seen, path.resolve())), tree)


def read_mapping(path: Path, wanted: str) -> MappingFile:
    """A YAML file that holds one mapping of keys, not validated. `wanted` ends the error about a file that holds none.

    Raises `UserError` with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = Origin(str(path), mark.line + 1 if mark else 0)
        raise UserError(f"{origin}: not valid YAML: {error.problem or error.context}") from None
    origins: dict[KeyPath, Origin] = {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: {wanted}")
    return MappingFile(_construct(loader, node, (), str(path), origins), origins)


def _construct(
    loader: _Loader, node: yaml.Node, key: KeyPath, file: str, origins: dict[KeyPath, Origin]
) -> Any:
    origins.setdefault(key, Origin(file, node.start_mark.line + 1))
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name, line = str(loader.construct_object(key_node)), key_node.start_mark.line + 1
            if name in values:
                raise UserError(f"{Origin(file, line)}: key '{_dotted((*key, name))}' is given twice")
            origins[(*key, name)] = Origin(file, line)
            values[name] = _construct(loader, value_node, (*key, name), file, origins)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*key, i), file, origins) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _merge(base: MappingFile, top: MappingFile) -> MappingFile:
    """Mappings merge key by key; lists and scalars of `top` replace those of `base`, those of a `key+` are added to it."""
    additions = list(_take_additions(top.values, ()))
    values = merge_mappings(base.values, top.values)
    origins = {key: origin for key, origin in base.origins.items() if not _replaced(key, top.values)}
    tree = MappingFile(values, origins | top.origins)
    for key, added in additions:
        _add_to_list(tree, key, added, where=_where(key, tree.origins))
    return tree


def _take_additions(values: dict[str, Any], section: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Take all `key+` out of the mapping: the path with the sign, and the value."""
    for name in list(values):
        if name.endswith("+"):
            yield (*section, name), values.pop(name)
        elif isinstance(values[name], dict):
            yield from _take_additions(values[name], (*section, name))


def _add_to_list(tree: MappingFile, key: KeyPath, added: Any, *, where: str) -> None:
    """Append `added`, an entry or a list of them, to the list that `key` names without its `+`."""
    path: KeyPath = (*key[:-1], str(key[-1])[:-1])
    node: Any = tree.values
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, list):
        raise UserError(f"{where}: it adds to a list, and there is no list '{_dotted(path)}' to add to")
    first, entries = len(node), added if isinstance(added, list) else [added]
    node.extend(entries)
    for written in [written for written in tree.origins if written[: len(key)] == key]:
        origin, inner = tree.origins.pop(written), written[len(key) :]
        if isinstance(added, list) and inner:
            tree.origins[(*path, first + int(inner[0]), *inner[1:])] = origin
        elif not isinstance(added, list):
            tree.origins[(*path, first, *inner)] = origin


def merge_mappings(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else in `top` replaces what `base` has."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge_mappings(base[key], value) if both else value
    return merged


def _replaced(key: KeyPath, values: Any) -> bool:
    for part in key:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return False


def _apply_override(tree: MappingFile, override: str) -> None:
    path, equals, text = override.partition("=")
    shown = word_without_secrets(override)
    if not equals or not path.strip():
        raise UserError(f"--set {shown!r}: expected key.path=value, as in --set optimizer.lr=1e-4")
    keys: KeyPath = tuple(int(part) if part.isdigit() else part for part in path.strip().split("."))
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {shown!r}: the value is not valid YAML; quote it?") from None
    if str(keys[-1]).endswith("+"):
        tree.origins[keys] = Origin(f"--set {shown}", 0)
        _add_to_list(tree, keys, value, where=f"--set {shown}")
        return
    node: Any = tree.values
    for depth, part in enumerate(keys[:-1]):
        node = _child(node, part, keys[: depth + 1])
    _child(node, keys[-1], keys, value=value)
    tree.origins = {key: origin for key, origin in tree.origins.items() if key[: len(keys)] != keys}
    tree.origins[keys] = Origin(f"--set {shown}", 0)


_MISSING = object()


def _child(node: Any, part: str | int, path: KeyPath, *, value: Any = _MISSING) -> Any:
    """Step into `node[part]`, or set it to `value`; sections that the recipe leaves out come into being."""
    if isinstance(node, list):
        if not isinstance(part, int) or part >= len(node):
            raise UserError(f"--set {_dotted(path)}: this list has the indices 0 to {len(node) - 1}")
    elif not isinstance(node, dict):
        raise UserError(f"--set {_dotted(path)}: '{_dotted(path[:-1])}' is a single value, it has no keys")
    if value is not _MISSING:
        node[part] = value
        return value
    if isinstance(node, dict) and node.get(part) is None:
        node[part] = {}
    return node[part]


def _explain(error: ValidationError, tree: MappingFile) -> str:
    lines: dict[str, str] = {}
    for problem in error.errors():
        key = _real_path(problem["loc"], tree.values)
        message, where = _message(problem, key, tree.values), _where(key, tree.origins)
        lines[where] = f"{lines[where]}, or: {message}" if where in lines else f"{where}: {message}"
    return "\n".join(lines.values())


def _origin_of(key: KeyPath, origins: dict[KeyPath, Origin]) -> Origin | None:
    """The line of the key itself, of something below it (a section that an override made), or of what holds it."""
    below = next((origin for other, origin in origins.items() if key and other[: len(key)] == key), None)
    around = (origins[key[:n]] for n in range(len(key) - 1, -1, -1) if key[:n] in origins)
    return origins.get(key) or below or next(around, None)


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


def _message(problem: Any, key: KeyPath, values: Any) -> str:
    if problem["type"] == "extra_forbidden":
        known = _known_keys(key[:-1], values)
        return f"unknown key{did_you_mean(str(key[-1]), known)}; known keys here: {', '.join(known)}"
    if problem["type"] == "missing":
        return "this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return text_without_secrets(message)
    choices = (
        re.findall(r"'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    )
    hint = did_you_mean(str(problem["input"]), choices) if len(choices) > 1 else ""
    return f"{message} (found {without_secrets(problem['input'], _dotted(key))!r}){hint}"


def _known_keys(section: KeyPath, values: Any) -> list[str]:
    """The keys that a section of the recipe may have."""
    models: list[type[BaseModel]] = [Recipe]
    for part in section:
        fields = [m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        values = values[part]
        if models == [ObjectiveSpec] and isinstance(values, dict):
            models = [KINDS[values["kind"]].spec]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _dotted(key: KeyPath) -> str:
    return ".".join(str(part) for part in key)
