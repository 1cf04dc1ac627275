"""The trainable model: a Hugging Face causal LM with our attention and our loss, ready for DeepSpeed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import meta_model, model_config
from bico_ds.model.elementwise_kernels import kernels_for
from bico_ds.model.head import Comparison, Losses, swap_head
from bico_ds.model.lora import AdaptedWeights, add_lora, base_name, is_adapter, without_adapters
from bico_ds.model.model_folder import read_generation_config
from bico_ds.model.swap import check_attention, enter, swap_layers
from bico_ds.model.weights.checkpoint_weights import PREFIX
from bico_ds.model.weights.checksums import fingerprint_of
from bico_ds.model.weights.initialize import RandomWeights
from bico_ds.model.weights.load import (
    WeightFolder,
    check_names_and_shapes,
    holds_weights,
    open_weights,
    verify_loaded,
)
from bico_ds.model.weights.materialize import WeightSource, materialize
from bico_ds.named_parts import step_part


class TrainableModel(nn.Module):
    """Wraps `causal_lm`, a model of Hugging Face, whose own forward and generate are unchanged."""

    def __init__(
        self, causal_lm: PreTrainedModel, *, recompute_every: int = 0, base: str | None = None
    ) -> None:
        """`recompute_every`: recompute every k-th decoder layer in the backward pass; 0: none.

        `base`: the fingerprint of the weights that were read, as `base_fingerprint`; None: they were drawn.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.recompute_every = recompute_every
        self.base = base

    @property
    def config(self) -> PretrainedConfig:
        return self.causal_lm.config

    def forward(self, batch: PackedBatch) -> Losses:
        """Return the sums of the batch's weighted cross entropies and divergences, and each target's cross entropy.

        Every module runs equally often whatever the batch holds, and every parameter takes part in the backward pass, as
        ZeRO-3 needs on ranks whose batch has no loss row: once, and the decoder twice where the start model's hidden states
        are computed.
        """
        comparison = self._comparison(batch)
        hidden_TE = self._hidden(batch)
        predicting_NE = hidden_TE.index_select(0, batch.loss_rows)
        return self.causal_lm.lm_head(predicting_NE, batch.targets, comparison, batch.loss_weights)

    @torch.no_grad()
    def target_states(self, batch: PackedBatch) -> Tensor:
        """The hidden states that predict the batch's targets, [N, E], without a gradient."""
        return self._hidden(batch).index_select(0, batch.loss_rows)

    def _comparison(self, batch: PackedBatch) -> Comparison | None:
        """What the batch's rows are compared with; before the pass that is trained, whose activations are kept."""
        if batch.compared is None:
            return None
        compared = batch.compared
        return Comparison(
            index=compared.index,
            start_model=compared.teacher or self._start_model(batch, compared.index),
            exclude_target=compared.exclude_target,
        )

    def _start_model(self, batch: PackedBatch, index: Tensor) -> Tensor:
        """The hidden states of the loss rows of these numbers without adapters, [M, E]."""
        with without_adapters(self.causal_lm):
            return self.target_states(batch).index_select(0, index)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """The last hidden states [T, E].

        The decoder's layers are called here, not through its own forward: that would build a mask, and find
        documents in the position ids by itself, which goes wrong where positions have gaps.
        """
        decoder = self.causal_lm.model
        branch_1TE, total_1TE = decoder.embed_tokens(batch.input_ids[None]), None
        with step_part("rotation"):
            tables = decoder.rotary_emb(branch_1TE, position_ids=batch.position_ids[None])
        layout = None if batch.layout is None else batch.layout.with_masks(branch_1TE.dtype)
        shared: dict[str, Any] = {"position_embeddings": tables, "plan": batch.plan, "layout": layout}
        for index, layer in enumerate(decoder.layers):
            normed, total_1TE = enter(layer, branch_1TE, total_1TE)
            # While the layer runs, the sum has what the branch had.
            del branch_1TE
            recompute = self.recompute_every and index % self.recompute_every == 0
            if recompute and self.training and torch.is_grad_enabled():
                run = partial(checkpoint, layer, use_reentrant=False)
            else:
                run = layer
            branch_1TE, total_1TE = run(total_1TE, normed=normed, **shared)
        normed_1TE, _ = decoder.norm(branch_1TE, residual=total_1TE, fused=True)
        return normed_1TE[0]


def as_trained(
    causal_lm: PreTrainedModel, *, longest_document: int | None, loss_chunk_rows: int
) -> TrainableModel:
    """A Hugging Face causal LM that has its weights, changed in place, with the attention and loss of training.

    The backend is the one that `auto` means. `longest_document`: as `swap_layers` takes it. Raises `UserError` where the
    architecture is none that can be trained.
    """
    swap_layers(causal_lm, longest_document=longest_document)
    swap_head(causal_lm, loss_chunk_rows)
    return TrainableModel(causal_lm)


def build_model(
    spec: ModelSpec,
    *,
    seed: int,
    ds_config: dict[str, Any] | None,
    device: torch.device | str,
    longest_document: int | None = None,
) -> TrainableModel:
    """Build the model a recipe asks for. Collective, where there is a process group.

    `ds_config`: the complete DeepSpeed configuration; under ZeRO-3 the parameters are partitioned (the process group must
    be up). `device`: where parameters are, `meta` for shapes only. Weights are read from `spec.path`, or drawn from `seed`:
    the same for every world size; on `meta` their headers alone are read, and only where they are on this machine.
    `longest_document`: as `swap_layers` takes it.

    Raises `UserError` before anything expensive where path, architecture, LoRA's targets, or names and shapes of the
    weights are wrong; after loading, `UserError` where a stored tied head is not the embedding, and `RuntimeError` where a
    parameter is not what the file holds.
    """
    config = model_config(spec)
    check_attention(config, longest_document=longest_document)
    causal_lm = meta_model(config)
    swap_layers(causal_lm, spec.attention_backend, longest_document=longest_document)
    swap_head(causal_lm, spec.loss_chunk_rows)
    shapes = {name: parameter.shape for name, parameter in causal_lm.named_parameters()}
    if spec.lora is not None:
        add_lora(causal_lm, spec.lora)
    base = None
    device = torch.device(device)
    # Here, where its log line comes before what takes long.
    kernels_for(next(causal_lm.parameters()).dtype, device)
    start = None if spec.path is None else spec.path.here()
    if start is None:
        if device.type != "meta":
            _fill(causal_lm, RandomWeights(seed=seed, std=config.initializer_range), seed, ds_config, device)
    elif device.type != "meta" or holds_weights(start):
        weights = open_weights(start, allow_pickle=spec.allow_pickle)
        check_names_and_shapes(shapes, weights, tied_head=config.tie_word_embeddings)
        generation = read_generation_config(weights.folder, config)
        if device.type != "meta":
            _fill(causal_lm, weights, seed, ds_config, device)
            base = _verified_base(causal_lm, weights)
            causal_lm.generation_config = generation
    return TrainableModel(causal_lm, recompute_every=spec.activation_checkpointing, base=base)


def _fill(
    causal_lm: PreTrainedModel,
    weights: WeightSource,
    seed: int,
    ds_config: dict[str, Any] | None,
    device: torch.device,
) -> None:
    materialize(causal_lm, AdaptedWeights(weights, seed=seed), ds_config=ds_config, device=device)
    _refresh_rotary(causal_lm, device)


def _verified_base(causal_lm: PreTrainedModel, weights: WeightFolder) -> str:
    """The fingerprint of the weights that were read, once they are found to be the folder's."""
    base = {name: p for name, p in causal_lm.named_parameters() if not is_adapter(name)}
    checksums = verify_loaded(((base_name(name), p) for name, p in base.items()), weights)
    return fingerprint_of({PREFIX + name: checksums[base_name(name)] for name in base})


def _refresh_rotary(causal_lm: PreTrainedModel, device: torch.device) -> None:
    """Compute the rotary frequencies for real, in fp32: on the meta device they have no values."""
    decoder = causal_lm.model
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(causal_lm.config)


def check_rotary(model: TrainableModel) -> None:
    """Raise `UserError` where the rotary frequencies are not in fp32 any more.

    DeepSpeed before 0.19.2 casts buffers with the weights (DeepSpeed#8066). In bf16, at position 2000, phases are off by 0.1
    to 0.2 rad in the mean, and single ones by up to 3.6 (arithmetic, at bases of 1e4 to 5e5 and heads of 64 and 128).
    """
    rotary = model.causal_lm.model.rotary_emb
    if rotary.inv_freq.dtype != torch.float32:
        raise UserError(
            f"the rotary frequencies were cast to {rotary.inv_freq.dtype}, which ruins long positions: "
            "this DeepSpeed is too old, install 0.19.3 or newer"
        )
