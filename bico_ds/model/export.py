"""From the live model to a Hugging Face folder: what comes out is an ordinary causal LM in safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from bico_ds.config.errors import UserError
from bico_ds.model.build import TrainableModel
from bico_ds.model.shards import DTYPES, ShardWriter, atomic_folder, write_checksums


def export_model(
    engine_or_model: Any,
    tokenizer: Any | None,
    folder: str | Path,
    dtype: Literal["bf16", "fp32"] = "bf16",
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Write the causal LM's live weights, config, generation config and tokenizer to ``folder``.

    ``engine_or_model``: a DeepSpeed engine, a `TrainableModel` or a Hugging Face causal LM. Call it on every
    rank: under ZeRO-3 parameters are gathered one at a time, and rank 0 writes, holding one shard at most.
    ``folder`` appears complete or not at all, with the SHA-256 of each file in ``checksums.json``. Raises
    UserError where it exists and ``overwrite`` is off; what rank 0 meets in writing is raised on every rank.
    """
    causal_lm = _causal_lm(engine_or_model)
    tensors = dict(exported_parameters(causal_lm))
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    failures: list[Exception] = []  # kept while the ranks gather in step, raised at the end
    with ExitStack() as stack:
        if is_writer:
            with _caught(failures):
                temporary = stack.enter_context(atomic_folder(Path(folder), overwrite=overwrite))
                shapes = {name: full_shape(parts[0]) for name, parts in tensors.items()}
                writer = ShardWriter(temporary, shapes, DTYPES[dtype], max_shard_bytes=max_shard_bytes)
        for name, parts in tensors.items():
            with gathered(parts):
                if is_writer and not failures:
                    with _caught(failures):
                        writer.add(name, merged(parts))
        if is_writer and not failures:
            with _caught(failures):
                writer.close()
                write_settings(
                    temporary, causal_lm.config, causal_lm.generation_config, tokenizer, DTYPES[dtype]
                )
        _fail_together(failures)


def exported_parameters(causal_lm: nn.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (name in the exported model, the parameters it is made of); a tied parameter once."""
    for name, parameter in causal_lm.named_parameters():
        yield name, (parameter,)


def merged(parts: tuple[Any, ...]) -> Tensor:
    """The exported value of gathered ``parts``."""
    return parts[0]


def write_settings(
    folder: Path, config: PretrainedConfig, generation_config: Any, tokenizer: Any | None, dtype: torch.dtype
) -> None:
    """Write all of a Hugging Face folder that is not weights, then the checksums of everything in it."""
    settings = type(config).from_dict(config.to_dict())
    settings.dtype = dtype
    settings.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_checksums(folder)


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Make ZeRO-3 parameters whole on every rank for the block; others are whole already. Collective."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed  # seconds, and only ZeRO-3 needs it

    return deepspeed.zero.GatheredParameters(list(parameters))


def _causal_lm(engine_or_model: Any) -> Any:
    model = getattr(engine_or_model, "module", engine_or_model)
    return model.causal_lm if isinstance(model, TrainableModel) else model


@contextmanager
def _caught(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures.append(error)


def _fail_together(failures: list[Exception]) -> None:
    if dist.is_initialized():
        verdict = [repr(failures[0]) if failures else None]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None and not failures:
            raise UserError(f"rank 0 could not export: {verdict[0]}")
    if failures:
        raise failures[0]
