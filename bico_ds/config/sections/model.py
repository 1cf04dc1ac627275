"""The recipe's keys of the network: its weights, its precision, its kernels, and its low-rank adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bico_ds.config.bounds import Bound
from bico_ds.config.paths import FolderOrHubName
from bico_ds.config.section import Section
from bico_ds.config.sections.lora_keys import refuse_keys_of_peft


class LoraSpec(Section):
    """Low-rank adapters through `peft`; the base stays frozen."""

    rank: Annotated[int, Bound(least=1, why="it is the inner size of the adapters' matrices")] = Field(
        32,
        description="inner size of the adapters' matrices: a larger one learns more, and takes more memory",
        examples=[64],
    )
    alpha: Annotated[
        float,
        Bound(least=1e-6, most=1e6, why="adapters are scaled by alpha / rank, in the model's precision"),
    ] = Field(
        16.0,
        description="what adapters add is scaled by alpha / rank: raise it together with the rank",
        examples=[32],
    )
    dropout: Annotated[
        float, Bound(least=0, below=1, why="it is the share of an adapter's inputs that are dropped")
    ] = Field(
        0.01,
        description="share of an adapter's inputs that are dropped in training, against overfitting",
        examples=[0.05],
    )
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="the linear layers that get an adapter, by the last word of their names",
        examples=[["q_proj", "v_proj"]],
    )
    rslora: bool = Field(
        False,
        description="scale the adapters by alpha / sqrt(rank), not alpha / rank, which makes high ranks learn slowly "
        "(rsLoRA, arXiv 2312.03732)",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_are_ours(cls, values: Any) -> Any:
        refuse_keys_of_peft(values)
        return values


# Up to so many chunks the head sums its weight's gradient in bf16 (bico_ds/model/head.py). Such a sum stalls once a chunk
# adds less than its rounding: relative error 4e-3 over 16 chunks of 512 rows, 0.17 over 512 chunks of 16, where the
# gradient's own rounding is 2e-3.
LOW_PRECISION_CHUNKS = 16


class ModelSpec(Section):
    """Which network, from which weights."""

    path: FolderOrHubName | None = Field(
        None,
        description="safetensors folder or hub name of the start weights; null: random weights",
        examples=["meta-llama/Llama-3.1-8B"],
    )
    config: dict[str, Any] | None = Field(
        None,
        description="the values of the model's config.json; with them dry runs and plans need no weights",
        examples=[{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3}],
    )
    tokenizer: FolderOrHubName | None = Field(
        None,
        description="tokenizer folder or hub name; null: model.path's, else the first store's or the embedded task's",
        examples=["meta-llama/Llama-3.1-8B"],
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="precision of the forward and backward pass")
    attention_backend: Literal[
        "auto", "flash-attn", "aten-cuda", "flash-attn-3", "flash-attn-4", "triton", "cpu-flash", "oracle"
    ] = Field("auto", description="kernel of the attention passes, see docs/understand.md")
    activation_checkpointing: Annotated[int, Bound(least=0, most=10_000, why="it counts decoder layers")] = (
        Field(
            0,
            description="recompute every k-th decoder layer in the backward pass; 0: none, 1: all",
            examples=[1],
        )
    )
    loss_chunk_rows: Annotated[
        int, Bound(least=1, most=2**31 - 1, why="it counts rows of a batch, by 32-bit numbers")
    ] = Field(
        512,
        description="rows whose logits are in memory at a time; in bf16, batches of over 16 times as many rows take longer",
        examples=[256],
    )
    lora: LoraSpec | None = Field(
        None,
        description="low-rank adapters are trained, and the base stays frozen; null: all weights are trained",
    )
    allow_pickle: bool = Field(False, description="accept pickled weights (they can run code when loaded)")

    @model_validator(mode="after")
    def _has_a_source(self) -> ModelSpec:
        if self.path is None and self.config is None:
            raise ValueError("give 'path' (start weights) or 'config' (random weights of that architecture)")
        return self
