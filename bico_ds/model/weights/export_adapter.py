"""From a LoRA run, live or from its checkpoint, to an adapter folder that peft loads over the base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import ModelTokenizer, adopt_special_tokens, id_list, meta_model
from bico_ds.model.build import TrainableModel
from bico_ds.model.lora import add_lora, is_adapter
from bico_ds.model.model_folder import read_generation_config
from bico_ds.model.weights.adapter_folder import base_location, write_adapters
from bico_ds.model.weights.checkpoint_weights import open_checkpoint
from bico_ds.model.weights.export_checkpoint import check_trained, exported_config, start_folder
from bico_ds.model.weights.export_model import caught, fail_together, write_beside_weights
from bico_ds.model.weights.materialize import gathered
from bico_ds.model.weights.shards import DTYPES, refuse_existing


def export_adapter(
    model: TrainableModel,
    spec: ModelSpec,
    tokenizer: ModelTokenizer | None,
    folder: Path,
    dtype: Literal["bf16", "fp32"],
    *,
    write_card: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
) -> None:
    """Write the live adapters of `model`, their config, the generation config and the tokenizer to `folder`.

    `spec`: what the model was built of. Call it on every rank: under ZeRO-3 adapters are gathered one at a time, and rank 0
    keeps a copy of all of them in the host's memory, and writes; `write_card` as of `export_model`. `folder` appears whole
    or not at all. Raises as `export_model` does.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    failures: list[Exception] = []  # kept while the ranks gather in step, raised at the end
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.causal_lm.named_parameters():
        if is_adapter(name):
            with gathered((parameter,)):
                if is_writer:
                    tensors[name] = parameter.detach().to(device="cpu", dtype=DTYPES[dtype], copy=True)
    if is_writer:
        with caught(failures), ExitStack() as stack:
            refuse_existing(folder, overwrite=overwrite)
            temporary = stack.enter_context(atomic_folder(folder, replace=True))
            write_adapters(temporary, spec, tensors, DTYPES[dtype], fingerprint=model.base)
            generation = model.causal_lm.generation_config
            write_beside_weights(temporary, generation, tokenizer, write_card=write_card)
    fail_together(failures)


def export_adapter_checkpoint(
    checkpoint: Path,
    spec: ModelSpec,
    tokenizer: ModelTokenizer | None,
    folder: Path,
    dtype: Literal["bf16", "fp32"],
    *,
    generation: GenerationConfig | None = None,
    base: str | None = None,
    write_card: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
) -> GenerationConfig:
    """Write the adapters of a DeepSpeed checkpoint as `export_adapter` writes live ones: those that the run computed with.

    They are rounded to the training's dtype, in which the model had them, and then to `dtype`. The base's weights are not
    read, nor need they be here where the recipe holds the config; `base` is their fingerprint. `generation` and the return
    value as of `export_checkpoint`; `write_card` as of `export_model`. Raises `UserError` where `folder` has something in it
    and `overwrite` is off, where the run trained all weights or began with random ones, and where the checkpoint is not
    that model's.
    """
    if spec.lora is None:
        raise UserError("the run trained all weights: it has no adapters to write apart")
    base_location(spec)
    refuse_existing(folder, overwrite=overwrite)
    config = exported_config(spec, reads_base=False)
    if generation is None:
        generation = read_generation_config(start_folder(spec), config)
    trained, model = open_checkpoint(checkpoint), meta_model(config)
    add_lora(model, spec.lora)
    names = [name for name, _ in model.named_parameters() if is_adapter(name)]
    check_trained({name: model.get_parameter(name).shape for name in names}, trained)
    tensors = {name: trained.read(name).to(config.dtype) for name in names}
    with atomic_folder(folder, replace=True) as temporary:
        write_adapters(temporary, spec, tensors, DTYPES[dtype], fingerprint=base)
        if tokenizer is not None:  # as a run does
            adopt_special_tokens(tokenizer, config, generation)
        write_beside_weights(temporary, generation, tokenizer, write_card=write_card)
    return generation


def stops_unlike_base(spec: ModelSpec, config: PretrainedConfig, generation: GenerationConfig) -> str | None:
    """What to know where adapters that stop as `generation` says belong to a base that stops otherwise; else None.

    peft and transformers take the base's generation config.
    """
    if spec.path is None or (spec.path.is_folder and not spec.path.is_here()):
        return None
    of_base = read_generation_config(spec.path.here(), config)
    if set(id_list(of_base.eos_token_id)) == set(id_list(generation.eos_token_id)):
        return None
    return (
        "the base's generation config, which peft takes, stops at other tokens than these texts end with: after loading set "
        "model.generation_config = GenerationConfig.from_pretrained(FOLDER), with this folder"
    )
