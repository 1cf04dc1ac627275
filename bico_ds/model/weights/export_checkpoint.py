"""From a checkpoint on disk to a Hugging Face folder, without ranks, GPU or DeepSpeed's engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import ModelTokenizer, adopt_special_tokens, meta_model, model_config
from bico_ds.model.build import TrainableModel
from bico_ds.model.lora import adapters_by_base_name, add_lora, base_name, is_adapter, merge_adapters
from bico_ds.model.model_folder import read_generation_config
from bico_ds.model.weights.blend import Blend, blended
from bico_ds.model.weights.checkpoint_weights import PREFIX, CheckpointWeights, open_checkpoint
from bico_ds.model.weights.checksums import fingerprint_of, slice_checksum
from bico_ds.model.weights.export_model import write_settings
from bico_ds.model.weights.load import WeightFolder, check_names_and_shapes, open_weights
from bico_ds.model.weights.shards import DTYPES, ShardWriter, refuse_existing


def _write_blend_card(blend: Blend | None, folder: Path) -> None:
    if blend is not None:
        blend.write(folder)


def export_checkpoint(
    checkpoint: Path,
    spec: ModelSpec,
    tokenizer: ModelTokenizer | None,
    folder: Path,
    dtype: Literal["bf16", "fp32"],
    *,
    generation: GenerationConfig | None = None,
    base: str | None = None,
    blends: Mapping[str, Blend] | None = None,
    write_card: Callable[[Blend | None, Path], None] = _write_blend_card,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> GenerationConfig:
    """Write the weights of a DeepSpeed checkpoint as `export_model` writes live ones, with one shard in memory at most.

    `blends`: what to write instead, by the names of folders in `folder`; "." is `folder` itself. The checkpoint and the
    base are read once for all of them; of each, one shard is in memory. A blend of share s is base + s (trained − base), in
    fp32, the base as the run loaded it, in the training's dtype (Wortsman et al., arXiv 2109.01903); of adapters
    that is base + s · scaling · B A. 0 is the base and 1 the run's own export, bit for bit.

    `spec`: the run's model section. Of a full fine-tuning only the config is needed; the export is made of the fp32 master
    weights under ZeRO-3, and below that of the weights in the training's dtype. LoRA reads the base from `spec.path` and
    merges, in fp32, base and adapters in the training's dtype. `generation`: the run's generation config; None: that
    beside the start weights, or where they are not here, the one that follows from the config. `base`: the
    `base_fingerprint` of the run's model. `write_card`: called with each model's blend, where it is one, and its
    folder, when all else but the checksums is in it; by default a blend says what it is. Returns the generation config that
    was written.

    Raises `UserError` where `folder` has something in it and `overwrite` is off, where the checkpoint cannot be read or is
    not that model's, and where the base of adapters or blends is missing or not the one that the run started from.
    """
    refuse_existing(folder, overwrite=overwrite)
    config = exported_config(spec)
    if generation is None:
        generation = read_generation_config(start_folder(spec), config)
    values = _Values(spec, config, open_checkpoint(checkpoint), needs_base=blends is not None)
    shapes = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    shares = {name: blend.share for name, blend in blends.items()} if blends is not None else {".": 1.0}
    with atomic_folder(folder, replace=True) as temporary:
        writers = {}
        for part in shares:
            (temporary / part).mkdir(exist_ok=True)
            writers[part] = ShardWriter(
                temporary / part, shapes, DTYPES[dtype], max_shard_bytes=max_shard_bytes
            )
        for name in shapes:
            start, trained = values.of(name)
            for part, share in shares.items():
                writers[part].add(name, blended(start, trained, share))
        values.check_base(base)
        if tokenizer is not None:  # as a run does
            adopt_special_tokens(tokenizer, config, generation)
        for part, writer in writers.items():
            writer.close()
            blend = blends[part] if blends is not None else None
            write_settings(
                temporary / part,
                config,
                generation,
                tokenizer,
                DTYPES[dtype],
                write_card=partial(write_card, blend),
            )
    return generation


def exported_config(spec: ModelSpec, *, reads_base: bool = True) -> PretrainedConfig:
    """The run's architecture; where the recipe has it, start weights may be gone by now, but for a merge.

    `reads_base`: whether the base of adapters, if there are any, is about to be read.
    """
    gone = spec.path is not None and spec.path.is_folder and start_folder(spec) is None
    if gone and spec.config is not None and not (reads_base and spec.lora is not None):
        spec = spec.model_copy(update={"path": None})
    return model_config(spec)


def export_record(model: TrainableModel, *, add_bos: bool) -> dict[str, Any]:
    """What an export carries that is not in the recipe, as JSON values, for a checkpoint's manifest.

    `add_bos`: whether the tokenizer begins texts with BOS.
    """
    generation = model.causal_lm.generation_config
    return {"add_bos": add_bos, "generation_config": json.loads(generation.to_json_string())}


class _Values:
    """Where each exported tensor comes from: the checkpoint, or base and adapters, and the base for blends."""

    def __init__(
        self, spec: ModelSpec, config: PretrainedConfig, trained: CheckpointWeights, *, needs_base: bool
    ) -> None:
        self._trained = trained
        self._dtype = config.dtype
        self._base: WeightFolder | None = None
        self._adapters: dict[str, tuple[str, str, float]] = {}
        self._base_checksums: dict[str, int] = {}  # by name in the run's model
        model = meta_model(config)
        if spec.lora is not None and spec.path is None:
            raise UserError("the adapters of a random base cannot be exported: the base is in no file")
        if needs_base and spec.path is None:
            raise UserError(
                "the run began with random weights (model.path: null), which are in no file: nothing to blend with"
            )
        if spec.path is not None and (needs_base or spec.lora is not None):
            self._base = open_weights(spec.path.here(), allow_pickle=spec.allow_pickle)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            check_names_and_shapes(shapes, self._base, tied_head=config.tie_word_embeddings)
        if spec.lora is not None:
            add_lora(model, spec.lora)
            self._adapters = _adapter_names(model)
        self._live_names = {base_name(name): PREFIX + name for name, _ in model.named_parameters()}
        self._is_adapted = spec.lora is not None
        check_trained({name: p.shape for name, p in model.named_parameters() if p.requires_grad}, trained)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """The tensor `name` of the base, and of the exported model; where no base is needed, that of the latter twice."""
        if self._base is None:
            trained = self._trained.read(name)
            return trained, trained
        shape = self._base.shapes[name]
        live = self._dtype  # the run computed with base and adapters in its dtype; so does the merge
        base = self._base.read(name, shape, 0, shape.numel()).view(shape).to(live)
        self._base_checksums[self._live_names[name]] = slice_checksum(base.view(-1), 0)
        if not self._is_adapted:
            return base, self._trained.read(name)
        if name not in self._adapters:
            return base, base
        a, b, scaling = self._adapters[name]
        merged = merge_adapters(base, self._trained.read(a).to(live), self._trained.read(b).to(live), scaling)
        return base, merged

    def check_base(self, fingerprint: str | None) -> None:
        """Raise `UserError` where the base, all of which was read by now, is not that of `fingerprint`."""
        if self._base is None or fingerprint is None:
            return
        if (found := fingerprint_of(self._base_checksums)) != fingerprint:
            raise UserError(
                f"the base in '{self._base.folder}' is not the one that this checkpoint's "
                f"{'adapters were trained on' if self._is_adapted else 'run started from'}: its fingerprint is "
                f"{found[:12]}, the checkpoint records {fingerprint[:12]}; name the right one with --base"
            )


def _adapter_names(model: nn.Module) -> dict[str, tuple[str, str, float]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters() if is_adapter(name)}
    return {
        base: (name_of[id(a)], name_of[id(b)], scaling)
        for base, (a, b, scaling) in adapters_by_base_name(model)
    }


def check_trained(expected: dict[str, torch.Size], trained: CheckpointWeights) -> None:
    """Raise `UserError` where a checkpoint does not hold the `expected` parameters, or holds adapters beside them."""
    found = {name: shape for name, shape in trained.shapes.items() if name in expected or is_adapter(name)}
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    wrong += sorted(found.keys() - expected)
    if wrong:
        raise UserError(
            f"'{trained.folder}' is not a checkpoint of this model: {len(wrong)} parameters are missing or "
            f"of another shape, first '{wrong[0]}'"
        )


def start_folder(spec: ModelSpec) -> Path | None:
    """The folder of the start weights if it is here; variables in its path may be set on the training machine only."""
    with suppress(UserError):
        if spec.path is not None and spec.path.is_here():
            return Path(spec.path.here())
    return None
