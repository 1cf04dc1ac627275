"""Runs of others whose throughput was published, and for each the closest run that this project could make.

Every figure is of the source that is named, at the commit that is named. MFU is computed under the source's own
convention: these differ by as much as implementations do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import this_checkout  # noqa: F401  first on sys.path

from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.config.sections.model import LoraSpec
from bico_ds.planner.architecture import Architecture, Linear, read_architecture
from bico_ds.planner.devices import DEVICES, GIB, Device

Convention = Callable[[Architecture, int], float]
"""Operations per token that a source counts, from the architecture and the tokens of a sequence."""

RANKS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """`tokens_per_second` per GPU; `mfu` as the source gives it, or its operations per second by its peak; None: neither.

    Ours: `sequences` of `length` tokens per micro-batch and GPU, `accumulation` micro-batches, so that a step has as many
    tokens as the source's. `differs`: what the source did otherwise.
    """

    name: str
    source: str
    architecture: Architecture
    lora: str | None
    recompute: bool
    device: Device
    gpus: int
    length: int
    sequences: int
    accumulation: int
    tokens_per_second: float
    mfu: float | None
    convention: str
    operations: Convention | None
    differs: str

    def recipe(self) -> Recipe:
        """Next-token prediction of full sequences, under ZeRO-3."""
        return load_recipe(
            "llama3_8b_ntp",
            [
                f"model.lora={self.lora or 'null'}",
                f"model.activation_checkpointing={int(self.recompute)}",
                f"data.capacity={self.length}",
                f"training.micro_batch_bins={self.sequences}",
                f"training.global_batch_bins={self.sequences * self.accumulation * self.gpus}",
                "evaluation.tasks=[]",
            ],
        )

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, RANKS_PER_NODE)

    def seconds_per_step(self) -> float:
        """Of the published run."""
        return self.sequences * self.accumulation * self.length / self.tokens_per_second

    def mfu_of_tokens(self) -> float | None:
        """MFU by the source's convention from its tokens per second."""
        if self.operations is None:
            return None
        return (
            self.operations(self.architecture, self.length) * self.tokens_per_second / self.device.bf16_flops
        )


def full_attention(architecture: Architecture, length: int) -> float:
    """6 N, and attention of all pairs, those that a causal mask hides among them: 12 · layers · hidden · length."""
    return 6 * architecture.parameters + 12 * architecture.layers * architecture.hidden * length


def causal_attention(architecture: Architecture, length: int) -> float:
    """6 per element of the matrices, without the embedding, and half of all pairs (AutoModel's `llama3_flops`)."""
    matrices = architecture.layers * architecture.layer_matrix_elements + architecture.embedding_parameters
    return 6 * matrices + 6 * architecture.layers * architecture.hidden * length


def adapters_of_rank_16(architecture: Architecture, length: int) -> float:
    """(2 + p) / 3 of `causal_attention`, p: adapters' parameters per frozen one (AutoModel's recipes/llm/benchmark.py)."""
    adapters = architecture.adapter_parameters(LoraSpec(rank=16))
    return causal_attention(architecture, length) * (2 + adapters / architecture.parameters) / 3


def mpt_70b() -> Architecture:
    """By the parameter count of its row, 64,862,437,376: 80 layers of 8192, 50,368 words, biases, a tied head.

    The planner knows models like Llama: the gate that MPT does not have is one of 0 outputs, its second bias of a norm is
    not counted, and neither are its 2048 position embeddings.
    """
    hidden, layers, vocabulary = 8192, 80, 50_368
    square = {"outputs": hidden, "inputs": hidden}
    return Architecture(
        model_type="mpt",
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=4 * hidden,
        layers=layers,
        heads=64,
        key_heads=64,
        head_dim=128,
        tied_head=True,
        qk_norms=False,
        linears=(
            *(Linear(name=name, **square, bias=True) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            Linear(name="gate_proj", outputs=0, inputs=hidden),
            Linear(name="up_proj", outputs=4 * hidden, inputs=hidden, bias=True),
            Linear(name="down_proj", outputs=hidden, inputs=4 * hidden, bias=True),
        ),
        source="tools/bench/published_runs.py",
    )


def _llama(recipe: str) -> Architecture:
    return read_architecture(load_recipe(recipe).model)


_H100 = DEVICES["h100-80g"]
_GRAND_TETON = replace(
    _H100,
    name="h100-96g",
    title="NVIDIA H100 with 96 GB HBM2e, 500 W",
    memory_bytes=94 * GIB,
    memory_bandwidth=2.4e12,
    source="torchtitan's page: 96 GB, 2.4 TB/s, 400 Gb/s; the data sheet's peak, although the power limit is 500 W of 700",
)
_FOUNDRY = (
    "https://github.com/mosaicml/llm-foundry/blob/061f2c7ce64e655100286584a7629e2a09f827ba/"
    "scripts/train/benchmarking/README.md (H100 80GB BF16)"
)
_AUTOMODEL = (
    "https://github.com/NVIDIA-NeMo/Automodel/blob/36044ad3d139363fb6c73c24af2e7c6b65ec52f6/"
    "docs/performance-summary.mdx (DGX-H100, BF16), and the configuration that it names"
)
_TITAN = (
    "https://github.com/pytorch/torchtitan/blob/b5bcd76c66d0acb1a08b176d9639425bc55e0b2a/"
    "benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md (bfloat16, async TP)"
)


def published_runs() -> tuple[PublishedRun, ...]:
    """Reads two recipes."""
    llama_8b, llama_70b = _llama("llama3_8b_ntp"), _llama("llama70b_ntp")
    return (
        PublishedRun(
            name="MPT-70B, 64 GPUs",
            source=_FOUNDRY,
            architecture=mpt_70b(),
            lora=None,
            recompute=True,
            device=_H100,
            gpus=64,
            length=2048,
            sequences=8,
            accumulation=4,
            tokens_per_second=66523 / 64,
            mfu=0.4257,
            convention="6 N and full attention",
            operations=full_attention,
            differs="FSDP (FULL_SHARD) of fp32 weights, learned positions and no gate; otherwise as here",
        ),
        PublishedRun(
            name="Llama-3 70B, 64 GPUs",
            source=_AUTOMODEL,
            architecture=llama_70b,
            lora=None,
            recompute=True,
            device=_H100,
            gpus=64,
            length=8192,
            sequences=1,
            accumulation=2,
            tokens_per_second=866.77,
            mfu=389 / 989,
            convention="6 N without the embedding, causal attention",
            operations=causal_attention,
            differs="FSDP2 over 32 with context parallelism of 2 (4096 tokens per GPU, 4 times), compiled",
        ),
        PublishedRun(
            name="Llama-3 8B, LoRA, 1 GPU",
            source=_AUTOMODEL,
            architecture=llama_8b,
            lora="{rank: 16, alpha: 32, dropout: 0.1}",
            recompute=False,
            device=_H100,
            gpus=1,
            length=4096,
            sequences=1,
            accumulation=32,
            tokens_per_second=12472.87,
            mfu=402 / 989,
            convention="two thirds of 6 N without the embedding, causal attention",
            operations=adapters_of_rank_16,
            differs="micro-batches of 2, for which ours has no room; kernels of Transformer Engine and Triton",
        ),
        PublishedRun(
            name="Llama-3 70B, LoRA, 8 GPUs",
            source=_AUTOMODEL,
            architecture=llama_70b,
            lora="{rank: 16, alpha: 32, dropout: 0.0}",
            recompute=True,
            device=_H100,
            gpus=8,
            length=4096,
            sequences=2,
            accumulation=2,
            tokens_per_second=1091.85,
            mfu=316 / 989,
            convention="two thirds of 6 N without the embedding, causal attention",
            operations=adapters_of_rank_16,
            differs="FSDP2 over 4 with tensor parallelism of 2 (4 times 2 sequences per pair), compiled",
        ),
        PublishedRun(
            name="Llama-3.1 70B, 256 GPUs",
            source=_TITAN,
            architecture=llama_70b,
            lora=None,
            recompute=True,
            device=_GRAND_TETON,
            gpus=256,
            length=8192,
            sequences=2,
            accumulation=1,
            tokens_per_second=652.4,
            mfu=None,
            convention="none given",
            operations=None,
            differs="FSDP2 over 32 with asynchronous tensor parallelism of 8 (16 sequences per 8), compiled, 500 W",
        ),
    )
