"""What a model folder says of its model: config.json and generation_config.json, which a stranger may have written.

No code from a model folder is ever run. What names some (`auto_map`, a kernel of the hub, `custom_generate`) is left out
where transformers has classes of its own for the model, which is said once, and refused where it has none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.paths import FolderOrHub
from bico_ds.model.families import FAMILIES
from bico_ds.runtime import launch_environment

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
_GENERATION = "generation_config.json"
# Keys that name an implementation, or for several parts of a model one each; a name with a slash is code on the hub.
_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
# What makes transformers read other files than we check.
_FOREIGN_FILES = {
    "transformers_weights": "it names a file of weights; give that file one of the usual names (model.safetensors)",
    "configuration_files": "it names configs for other versions of transformers; give the one that counts this name",
}
# Keys of a generation config by which programs find code.
_GENERATION_CODE = ("custom_generate", "trust_remote_code")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
_MOST_TOKENS = 2**31
_MOST_LETTERS = 500


@lru_cache
def warn_once(message: str) -> None:
    """On the first rank: all ranks read the same folder."""
    if launch_environment.rank() == 0:
        _logger.warning(message)


@contextmanager
def readable(folder: Path, *, where: str) -> Iterator[None]:
    """A block that looks into `folder`: an OSError of it is raised as `UserError`, which begins with `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}'{error.filename or folder}' cannot be read: {error.strerror or error}; correct its path or permissions"
        ) from error


def read_config(
    path: FolderOrHub,
    *,
    where: str,
    file: str = CONFIG,
    check: Callable[[Mapping[str, Any]], None] = lambda values: None,
) -> PretrainedConfig:
    """The config at `path`, as transformers reads it, without what names code.

    `where` begins an error, and the name of the `file` comes before its keys. `check` may refuse the values of the file,
    before transformers makes a config of them. Raises `UserError` where there is none, where it cannot be read, and for a
    model whose type transformers does not know.
    """
    about, where = where, f"{where}{file}: "
    values = _values(path, CONFIG, where=where)
    if values is None:
        raise UserError(f"{where}no such file; give a folder, or a hub name, with a {CONFIG}")
    _check_model_type(values, where)
    for key, reason in _FOREIGN_FILES.items():
        if values.get(key) is not None:
            raise UserError(f"{where}{key}: {reason}")
    _check_code(values, path, where)
    check(values)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # each class of transformers raises its own on values that make no model
        raise UserError(f"{about}cannot read the config of '{path}': {one_line(error)}") from error
    vars(config).pop("auto_map", None)  # an export is ours, and has no such code
    return config


def read_generation_config(path: FolderOrHub | None, config: PretrainedConfig) -> GenerationConfig:
    """The generation config at `path`; where there is none, the one that follows from the model's `config`.

    Raises `UserError` where it cannot be read.
    """
    values = None if path is None else _values(path, _GENERATION, where=f"{path}/{_GENERATION}: ")
    if values is None:
        return GenerationConfig.from_model_config(config)
    where = f"{path}/{_GENERATION}: "
    for key in _TOKEN_IDS:
        if not _are_token_ids(values.get(key)):
            raise UserError(
                f"{where}{key}: must be the number of a token, or a list of them, found {values[key]!r:.60}"
            )
    if any(key in values for key in _GENERATION_CODE) or (Path(str(path)) / "custom_generate").exists():
        warn_once(f"'{path}': its custom_generate is code, which is not run")
    try:
        generation = GenerationConfig.from_pretrained(str(path))
    except Exception as error:  # as of configs
        raise UserError(
            f"{where}cannot be used: {one_line(error)}; correct it, or remove the file"
        ) from error
    for key in _GENERATION_CODE:
        vars(generation).pop(key, None)
    return generation


def one_line(error: Exception) -> str:
    """What an exception of another program says, without line ends and values of any length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"


def _values(path: FolderOrHub, name: str, *, where: str) -> dict[str, Any] | None:
    """The object in a JSON file of a folder, or of a hub name; None where there is none."""
    if isinstance(path, Path):
        file = path / name
    else:
        try:
            found = cached_file(path, name, _raise_exceptions_for_missing_entries=name == CONFIG)
        except Exception as error:  # huggingface_hub, its HTTP client and transformers each raise their own
            raise UserError(f"{where}cannot be fetched: {one_line(error)}") from error
        if found is None:
            return None
        file = Path(found)
    try:
        return read_object(file, strict=False)
    except JsonError as error:
        if error.is_missing and not file.is_symlink():
            return None
        reason = "a link to a file that is not there" if error.is_missing else error.reason
        raise UserError(f"{where}cannot be read: {reason}; copy it again") from None


def _check_model_type(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("model_type")
    if not isinstance(kind, str):
        found = "is missing" if kind is None else f"must be a text, found {kind!r:.60}"
        raise UserError(f"{where}model_type: {found}; it names the kind of model, such as 'llama'")
    if kind in CONFIG_MAPPING:
        return
    if values.get("auto_map"):
        raise UserError(
            f"{where}model_type: '{kind:.60}' is no model of transformers: auto_map names code in its folder for it, "
            f"and such code is never run. Models that can be trained: {', '.join(FAMILIES)}"
        )
    hint = did_you_mean(kind, [*FAMILIES, *CONFIG_MAPPING])
    raise UserError(
        f"{where}model_type: unknown model type '{kind:.60}'{hint}; models that can be trained: {', '.join(FAMILIES)}"
    )


def _check_code(values: Mapping[str, Any], path: FolderOrHub, where: str) -> None:
    """Refuse the names of code which transformers would follow; say which one it does not."""
    for key in _IMPLEMENTATIONS:
        value = values.get(key)
        names = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(name, str) and "/" in name for name in names):
            raise UserError(
                f"{where}{key}: {value!r:.100} names code on the hub, which is never run; remove the key"
            )
    if "auto_map" not in values:
        return
    classes = values["auto_map"]
    if not isinstance(classes, Mapping) or not all(isinstance(name, str | list) for name in classes.values()):
        raise UserError(f"{where}auto_map: must give names of classes, found {classes!r:.60}; remove the key")
    warn_once(
        f"'{path}': auto_map in its {CONFIG} names code, which is not run: the {values['model_type']} model of transformers "
        "is taken"
    )


def _are_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(token) is int and -1 <= token < _MOST_TOKENS for token in ids)
