"""A model and its tokenizer for evaluation: by transformers alone, as any user of an export loads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from bico_ds.config.errors import UserError
from bico_ds.config.folders import is_local_folder
from bico_ds.data.tokenizer import load_tokenizer, vocabulary_size
from bico_ds.model.architecture import check_vocabulary

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


def load_for_evaluation(
    path: str, *, dtype: Literal["auto", "bf16", "fp32"] = "auto", device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer) from a safetensors folder or a hub name; `auto` keeps the dtype of the weights.

    Raises UserError for a folder without config, safetensors or tokenizer, and where a weight of the model is
    not in the files (transformers would draw it at random).
    """
    check_model_folder(path)
    if is_local_folder(path):
        path = str(Path(path).expanduser())
    tokenizer = load_tokenizer(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: cannot be loaded: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))
            raise UserError(f"--model {path}: {len(names)} {kind.replace('_', ' ')}, the first is {names[0]}")
    check_vocabulary(model.config, vocabulary_size(tokenizer), tokenizer=path)
    return model.to(device).eval(), tokenizer


def weights_stamp(path: str) -> str:
    """A name for the weights at `path`, from sizes and times of its files; a hub name stands for itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]


def check_model_folder(path: str) -> None:
    """UserError for a local folder without config or safetensors; a hub name is not looked up."""
    if not is_local_folder(path):
        return
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--model {folder}: no such folder")
    if not (folder / "config.json").is_file():
        inside = next(iter(sorted(folder.glob("*/config.json"))), None)
        hint = f"; did you mean {inside.parent}?" if inside else ""
        raise UserError(f"--model {folder}: no config.json in it{hint}")
    if not list(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only pickled weights ({pickled[0].name}), which can run code" if pickled else "no weights"
        raise UserError(f"--model {folder}: {found}; give a folder with *.safetensors")
