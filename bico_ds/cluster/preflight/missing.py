"""What a start on this machine would lack, and what to do about each: for dry runs, which need none of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel
from torch.utils import cpp_extension

from bico_ds.cluster.preflight.inputs import missing_inputs
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import text_without_secrets
from bico_ds.config.paths import WrittenPath
from bico_ds.config.schema import Recipe
from bico_ds.runtime.deepspeed_ops import needed


def what_is_missing(recipe: Recipe) -> list[str]:
    """A line for each thing: variables, weights, tokenizer, data, GPUs, what compiles. Raises nothing; shows no secret.

    Files are looked for once all variables of the recipe's paths are set: without them it is not known which.
    """
    variables = list(_unset_variables(recipe))
    files = variables or [*missing_inputs(recipe), *_not_downloaded(recipe)]
    found = [*files, *_hardware(recipe), *_compilers(recipe)]
    return [text_without_secrets(line) for line in dict.fromkeys(found)]


def _unset_variables(recipe: Recipe) -> Iterator[str]:
    """What is wrong with paths that cannot be expanded here, each with file, line and key."""
    for path in _paths(recipe):
        try:
            path.expanded()
        except UserError as error:
            yield str(error)


def _paths(tree: Any) -> Iterator[WrittenPath]:
    """All paths of a recipe, or of a part of it."""
    if isinstance(tree, WrittenPath):
        yield tree
    elif isinstance(tree, BaseModel | dict):
        for _, value in tree.items() if isinstance(tree, dict) else tree:
            yield from _paths(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _paths(value)


def _not_downloaded(recipe: Recipe) -> Iterator[str]:
    """Models and tokenizers of the hub that a start would have to download."""
    for key, value in (("model.path", recipe.model.path), ("model.tokenizer", recipe.model.tokenizer)):
        name = value.here() if value is not None else None
        if name is None or isinstance(name, Path):
            continue
        file = "config.json" if key == "model.path" else "tokenizer_config.json"
        if not isinstance(try_to_load_from_cache(name, file), str):
            yield (
                f"{key} ({name}): not in this machine's cache of the hub; a start downloads it, or `hf download {name}` "
                "before (`hf auth login` first, where its owner asks for consent)"
            )


def _hardware(recipe: Recipe) -> Iterator[str]:
    """GPUs, for a recipe that names one (`distributed.gpu`)."""
    gpu, ranks = recipe.distributed.gpu, recipe.distributed.world_size
    if gpu is None:
        return
    count = torch.cuda.device_count()
    if not count:
        yield f"GPU (distributed.gpu: {gpu}): torch {torch.__version__} finds none here; {_remedy()}"
    elif ranks is not None and ranks > count:
        yield (
            f"GPUs (distributed.world_size: {ranks}): {count} on this machine; start it on more machines "
            f"(docs/cluster.md), or set distributed.world_size={count}"
        )


def _remedy() -> str:
    elsewhere = "start it on a machine that has them (bico-ds submit, docs/cluster.md)"
    if torch.version.cuda is None:
        return f"{elsewhere}; if this one does, this torch is built without CUDA (docs/run.md#install)"
    return f"{elsewhere}; if this one does, look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def _compilers(recipe: Recipe) -> Iterator[str]:
    """What DeepSpeed compiles its operations with at the first run."""
    try:
        operations = ", ".join(needed(recipe, on_cuda=torch.cuda.is_available()))
    except UserError:
        return  # of a configuration that is refused, with its reason
    compiler = os.environ.get("CXX") or "c++"
    if operations and shutil.which(compiler) is None:
        yield (
            f"C++ compiler: '{compiler}' is not found, and the first run compiles {operations}; install g++, or name one "
            "by CXX"
        )
    if operations and torch.cuda.is_available() and (problem := _toolkit_problem()) is not None:
        yield (
            f"CUDA_HOME: {problem}, and the first run compiles {operations}; export CUDA_HOME=/usr/local/cuda-"
            f"{torch.version.cuda} (a CUDA toolkit of torch's version)"
        )


def _toolkit_problem() -> str | None:
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "no CUDA toolkit is found"
    nvcc = os.path.join(home, "bin", "nvcc")
    return None if os.access(nvcc, os.X_OK) else f"'{nvcc}' is not there"
