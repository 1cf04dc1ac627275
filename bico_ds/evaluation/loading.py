"""Load a model and its tokenizer for evaluation, with transformers alone, as any user of an export would."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.exported_tokenizer import adds_bos
from bico_ds.data.tokenizer import FastTokenizer, Tokenizer, load_tokenizer, needed_vocabulary
from bico_ds.model.architecture import check_vocabulary
from bico_ds.model.config_values import check_shapes, check_values
from bico_ds.model.families import FAMILIES
from bico_ds.model.weights.load import SAFETENSORS, weight_files

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}
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
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be loaded: {error}") from error
    model, info = loaded  # a pair because of `output_loading_info`, which transformers' annotation leaves out
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))
            raise UserError(
                f"{option} {path}: {len(names)} {kind.replace('_', ' ')}, the first is {names[0]}"
            )
    return model.to(device).eval(), tokenizer


def load_tokenizer_and_context(
    path: FolderOrHub, *, option: str = "--model"
) -> tuple[FastTokenizer, int | None]:
    """(tokenizer, context in tokens or None where the config names none), to check inputs before the weights are loaded.

    Raises `UserError` for a folder without config, safetensors or tokenizer, for a config that makes no model, and for a
    tokenizer of another vocabulary.
    """
    check_model_folder(path, option)
    try:
        tokenizer = load_tokenizer(path)
        values, _ = PretrainedConfig.get_config_dict(str(path))
        if is_ours := values.get("model_type") in FAMILIES:
            check_values(values, where="config.json: ")
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        if is_ours:
            check_shapes(config, where="config.json: ")
        check_vocabulary(config, needed_vocabulary(tokenizer, config.vocab_size), tokenizer=str(path))
    except (OSError, ValueError) as error:  # a UserError is a ValueError
        raise UserError(f"{option} {path}: {error}") from error
    return tokenizer, getattr(config, "max_position_embeddings", None)


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
    try:
        return GenerationConfig.from_pretrained(str(path))
    except OSError:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        return GenerationConfig.from_model_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: generation_config.json cannot be read: {error}") from error


def weights_stamp(path: FolderOrHub) -> str:
    """A name for the weights and tokenizer at `path`; a hub name stands for itself.

    It is made from names, sizes and times of the folder's files, not from their contents; and from the names of those
    with weights that are not read.
    """
    if not isinstance(path, Path):
        return path
    read = {*weight_files(path)}
    files = sorted({file for pattern in _STAMPED for file in path.glob(pattern)} | read)
    stamp: list[Any] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    unread = {file for file in files if file.suffix == ".safetensors"} - read
    stamp += sorted(file.name for file in unread)
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]


def check_model_folder(folder: FolderOrHub, option: str = "--model") -> None:
    """Raise `UserError` for a local folder without config or complete safetensors; a hub name is not looked up."""
    if not isinstance(folder, Path):
        return
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder")
    if not (folder / "config.json").is_file():
        inside = next(iter(sorted(folder.glob("*/config.json"))), None)
        hint = f"; did you mean {inside.parent}?" if inside else ""
        raise UserError(f"{option} {folder}: no config.json in it{hint}")
    if not list(folder.glob("*.safetensors")) and not (folder / f"{SAFETENSORS}.index.json").exists():
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only pickled weights ({pickled[0].name}), which can run code" if pickled else "no weights"
        raise UserError(f"{option} {folder}: {found}; give a folder with *.safetensors")
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(f"{option} {folder}: {str(error).removeprefix('model.path: ')}") from None
