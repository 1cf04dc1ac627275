"""Load a model and its tokenizer for evaluation, with transformers alone, as any user of an export would."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import read_object
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.exported_tokenizer import adds_bos
from bico_ds.data.tokenizer import FastTokenizer, Tokenizer, load_tokenizer, needed_vocabulary
from bico_ds.model.architecture import check_vocabulary
from bico_ds.model.config_values import check_shapes, check_values
from bico_ds.model.families import FAMILIES
from bico_ds.model.model_folder import CONFIG, one_line, read_config, read_generation_config, readable
from bico_ds.model.weights.adapter_folder import ADAPTER_CONFIG, AdapterFolder
from bico_ds.model.weights.load import SAFETENSORS, refuse_adapters, weight_files
from bico_ds.model.weights.safetensors_header import read_header

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}
# What transformers raises on a folder that makes no model; not what may lie in the machine (RuntimeError, MemoryError).
_LOADING_ERRORS = (
    SafetensorError, ImportError, OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
# The files that an answer depends on; of the generation config only `stop_ids`, which are in the identity of each task.
_STAMPED = ("*.safetensors", "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")


def load_for_evaluation(
    path: FolderOrHub,
    *,
    option: str = "--model",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, Tokenizer]:
    """(model, tokenizer) from a safetensors folder or a hub name; `auto` keeps the dtype of the weights.

    Raises `UserError`, which begins with `option`, for a folder without config, safetensors or tokenizer, for a tokenizer of
    another vocabulary, and where a weight of the model is not in the files (transformers would draw it at random).
    """
    tokenizer, _ = load_tokenizer_and_context(path, option=option)
    adapters = AdapterFolder.at(path)
    wanted: Any = _DTYPES[dtype]
    if dtype == "auto" and adapters is not None:
        wanted = adapters.dtype or "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(weights_at(path)),
            # Adapters are merged into the weights that they were trained on, and rounded afterwards.
            dtype=torch.float32 if adapters is not None and adapters.dtype is torch.float32 else wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
        )
    except _LOADING_ERRORS as error:
        raise UserError(f"{option} {path}: cannot be loaded: {one_line(error)}") from error
    model, info = loaded  # a pair because of `output_loading_info`, which transformers' annotation leaves out
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
            raise UserError(
                f"{option} {path}: {len(names)} {kind.replace('_', ' ')}, the first is {names[0]}"
            )
    model = model.to(device)
    if adapters is not None:
        try:
            adapters.merge_into(model)
        except UserError as error:
            raise UserError(f"{option} {path}: {error}") from None
        model.generation_config = load_generation_config(
            path
        )  # its stops are those of the texts, not the base's
        if wanted != "auto":
            for (
                parameter
            ) in model.parameters():  # not the rotary frequencies, which are in fp32 in every model
                parameter.data = parameter.data.to(wanted)
    return model.eval(), tokenizer


def weights_at(path: FolderOrHub) -> FolderOrHub:
    """Where the config and the whole weights of the model at `path` are: there, or of adapters in their base's place."""
    adapters = AdapterFolder.at(path)
    return path if adapters is None else adapters.base


def load_tokenizer_and_context(
    path: FolderOrHub, *, option: str = "--model"
) -> tuple[FastTokenizer, int | None]:
    """(tokenizer, context in tokens or None where the config names none), to check inputs before the weights are loaded.

    Raises `UserError` for a folder without config, safetensors or tokenizer, for a config that makes no model, and for a
    tokenizer of another vocabulary.
    """
    check_model_folder(path, option)
    try:
        config = config_at(path)
        tokenizer = load_tokenizer(path)
        check_vocabulary(
            config.vocab_size, needed_vocabulary(tokenizer, config.vocab_size), tokenizer=str(path)
        )
    except (OSError, ValueError) as error:  # a UserError is a ValueError
        raise UserError(f"{option} {path}: {error}") from error
    return tokenizer, getattr(config, "max_position_embeddings", None)


def config_at(path: FolderOrHub, where: str = "") -> PretrainedConfig:
    """The config at `path`, of any model that transformers has. Raises `UserError` where it makes no model."""

    def check(values: Mapping[str, Any]) -> None:
        if values["model_type"] in FAMILIES:
            check_values(values, where=f"{where}{CONFIG}: ")

    config = read_config(weights_at(path), where=where, check=check)
    if config.model_type in FAMILIES:
        check_shapes(config, where=f"{where}{CONFIG}: ")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(
        getattr(config, "vocab_size", None), int
    ):
        raise UserError(
            f"{where}{CONFIG}: model_type: a {config.model_type} model is no causal language model, which continues texts"
        )
    return config


def begins_with_bos(path: FolderOrHub, tokenizer: FastTokenizer) -> bool:
    """Whether prompts for the model at `path` begin with BOS, where its tokenizer has one.

    Where its tokenizer_config.json has `add_bos_token`, as in our exports, they do if its tokenizer puts BOS there. Else
    they do, as the texts of a run begin with BOS unless it is switched off: earlier exports record nothing.
    """
    if "add_bos_token" in get_tokenizer_config(str(path)):
        return adds_bos(tokenizer)
    return tokenizer.bos_token_id is not None


def load_generation_config(path: FolderOrHub) -> GenerationConfig:
    """The generation config at `path` as `AutoModelForCausalLM` takes it: that of the folder, or made of the config.

    Raises `UserError` where it cannot be read.
    """
    return read_generation_config(path, config_at(path, f"{path}: "))


def weights_stamp(path: FolderOrHub) -> str:
    """A name for the weights and tokenizer at `path`; a hub name stands for itself.

    It is made from names, sizes and times of the folder's files, not from their contents; and from the names of those
    with weights that are not read.
    """
    if not isinstance(path, Path):
        return path
    if (adapters := AdapterFolder.at(path)) is not None:
        files = sorted(
            {file for pattern in _STAMPED for file in path.glob(pattern)} | {path / ADAPTER_CONFIG}
        )
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr([stamps, weights_stamp(adapters.base)]).encode()).hexdigest()[:16]
    read = {*weight_files(path)}
    files = sorted({file for pattern in _STAMPED for file in path.glob(pattern)} | read)
    stamp: list[Any] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    unread = {file for file in files if file.suffix == ".safetensors"} - read
    stamp += sorted(file.name for file in unread)
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]


def check_model_folder(folder: FolderOrHub, option: str = "--model") -> None:
    """Raise `UserError` for a local folder without config or whole safetensors; a hub name is not looked up.

    Of the weights the headers are read.
    """
    if not isinstance(folder, Path):
        return
    try:
        with readable(folder, where=""):
            if (adapters := AdapterFolder.at(folder)) is not None:
                adapters.check()
                check_model_folder(adapters.base, "its base")
                return
            _check_is_model(folder)
            refuse_adapters(folder)
            files = weight_files(folder)
            if files != [folder / SAFETENSORS]:
                _check_index(folder / f"{SAFETENSORS}.index.json")
            for file in files:
                read_header(file)
    except UserError as error:
        raise UserError(f"{option} {folder}: {str(error).removeprefix('model.path: ')}") from None


def _check_index(index: Path) -> None:
    """Refuse what transformers alone needs of a weights index, which `weight_files` has read."""
    if not isinstance(read_object(index).get("metadata"), dict):
        raise UserError(
            f"'{index}' has no metadata, without which transformers does not read it: add \"metadata\": {{}}"
        )


def _check_is_model(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError("no such folder")
    if not (folder / CONFIG).is_file() and not (folder / CONFIG).is_symlink():
        inside = next(iter(sorted(folder.glob(f"*/{CONFIG}"))), None)
        hint = f"; did you mean {inside.parent}?" if inside else ""
        raise UserError(f"no config.json in it{hint}")
    if not list(folder.glob("*.safetensors")) and not os.path.lexists(folder / f"{SAFETENSORS}.index.json"):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only pickled weights ({pickled[0].name}), which can run code" if pickled else "no weights"
        raise UserError(f"{found}; give a folder with *.safetensors")
