"""From the live model to a Hugging Face folder: what comes out is an ordinary causal LM in safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.model.architecture import ModelTokenizer
from bico_ds.model.build import TrainableModel
from bico_ds.model.lora import adapters_by_base_name, base_name, is_adapter, merge_adapters
from bico_ds.model.weights.materialize import full_shape, gathered
from bico_ds.model.weights.shards import DTYPES, ShardWriter, refuse_existing, write_checksums


def export_model(
    model: TrainableModel | PreTrainedModel,
    tokenizer: ModelTokenizer | None,
    folder: str | Path,
    dtype: Literal["bf16", "fp32"] = "bf16",
    *,
    write_card: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Write the causal LM's live weights, config, generation config and tokenizer to `folder`.

    Call it on every rank: under ZeRO-3 parameters are gathered one at a time, and rank 0 writes, holding one shard at
    most. LoRA adapters are merged, in fp32. `write_card`: called by rank 0 with the folder when all else but its checksums
    is in it.
    `folder` appears complete or not at all, with the SHA-256 of each other file in `checksums.json`. Raises `UserError`
    where it has something in it and `overwrite` is off. An error of rank 0 in writing is raised there, and as `UserError`
    on the other ranks.
    """
    causal_lm = model.causal_lm if isinstance(model, TrainableModel) else model
    tensors = dict(exported_parameters(causal_lm))
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    failures: list[Exception] = []  # kept while the ranks gather in step, raised at the end
    with ExitStack() as stack:
        if is_writer:
            with caught(failures):
                refuse_existing(Path(folder), overwrite=overwrite)
                temporary = stack.enter_context(atomic_folder(Path(folder), replace=True))
                shapes = {name: full_shape(parts[0]) for name, parts in tensors.items()}
                writer = ShardWriter(temporary, shapes, DTYPES[dtype], max_shard_bytes=max_shard_bytes)
        for name, parts in tensors.items():
            with gathered(parts[:3]):
                if is_writer and not failures:
                    with caught(failures):
                        writer.add(name, merge_adapters(*parts) if len(parts) > 1 else parts[0])
        if is_writer and not failures:
            with caught(failures):
                writer.close()
                write_settings(
                    temporary,
                    causal_lm.config,
                    causal_lm.generation_config,
                    tokenizer,
                    DTYPES[dtype],
                    write_card=write_card,
                )
        fail_together(failures)


def exported_parameters(causal_lm: nn.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (name in the exported model, its parts: (base,) or (base, A, B, scaling)); a tied one once."""
    adapters = dict(adapters_by_base_name(causal_lm))
    for name, parameter in causal_lm.named_parameters():
        if not is_adapter(name):
            yield base_name(name), (parameter, *adapters.get(base_name(name), ()))


def write_settings(
    folder: Path,
    config: PretrainedConfig,
    generation_config: Any,
    tokenizer: ModelTokenizer | None,
    dtype: torch.dtype,
    *,
    write_card: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write all of a Hugging Face folder that is not weights, then the checksums of everything in it."""
    settings = type(config).from_dict(config.to_dict())
    settings.dtype = dtype
    settings.save_pretrained(folder)
    _add_names_of_transformers_4(folder / "config.json")
    write_beside_weights(folder, generation_config, tokenizer, write_card=write_card)


def write_beside_weights(
    folder: Path,
    generation_config: Any,
    tokenizer: ModelTokenizer | None,
    *,
    write_card: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write what a folder of a model or of adapters has beside weights and config, then the checksums of all of it."""
    # `save_pretrained` refuses what published models have (a temperature without `do_sample`), once a token has changed.
    generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_card(folder)
    write_checksums(folder)


def _add_names_of_transformers_4(file: Path) -> None:
    """Say in a config.json what `rope_parameters` and `dtype` say also by the names that others read.

    transformers 4, and what is built on it, take a theta of 10,000 without scaling where `rope_theta` and `rope_scaling` are
    missing. transformers 5 reads both, and `rope_scaling` first.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    # `type` is the older name of `rope_type`; transformers 4 prefers it where both are there.
    scaling = {key: value for key, value in values["rope_parameters"].items() if key != "type"}
    values["rope_theta"] = scaling.pop("rope_theta")
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    values["torch_dtype"] = values["dtype"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def caught(failures: list[Exception]) -> Iterator[None]:
    """A block whose error is kept in `failures`, and not raised."""
    try:
        yield
    except Exception as error:
        failures.append(error)


def fail_together(failures: list[Exception]) -> None:
    """Raise the first rank's first failure there, and on the others a `UserError` that tells it. Collective."""
    if dist.is_initialized():
        verdict = [repr(failures[0]) if failures else None]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None and not failures:
            raise UserError(f"rank 0 could not export: {verdict[0]}")
    if failures:
        raise failures[0]
