"""LoRA (Hu et al., arXiv 2106.09685) through `peft`: adapters on the decoder's linear layers; the base is frozen.

Adapters are injected while the model is on the meta device, so that base and adapters enter ZeRO-3 in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.sections.model import LoraSpec
from bico_ds.model.weights.initialize import named_generator
from bico_ds.model.weights.materialize import WeightSource

_ADAPTER = "default"
_BASE = ".base_layer."


def add_lora(causal_lm: PreTrainedModel, spec: LoraSpec) -> None:
    """Inject adapters into a causal LM on the meta device and freeze the rest, in place.

    Raises `UserError` as `check_lora` does.
    """
    check_lora(causal_lm, spec)
    inject_adapter_in_model(peft_config(spec), causal_lm, low_cpu_mem_usage=True)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        parameter.data = parameter.data.to(causal_lm.config.dtype)  # peft makes adapters fp32


def peft_config(spec: LoraSpec) -> LoraConfig:
    """The adapters of `spec` as peft names them."""
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets),
        use_rslora=spec.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def check_lora(causal_lm: PreTrainedModel, spec: LoraSpec) -> None:
    """Raise `UserError` where `spec.targets` names no linear layer of the decoder, or its rank is above a matrix's own."""
    linear = {
        name.rsplit(".", 1)[-1]: part
        for name, part in causal_lm.model.layers.named_modules()
        if isinstance(part, nn.Linear)
    }
    for target in spec.targets:
        if target not in linear:
            raise UserError(
                f"model.lora.targets: no linear layer '{target}' in the decoder"
                f"{did_you_mean(target, linear)}; there are {', '.join(sorted(linear))}"
            )
        outputs, inputs = linear[target].weight.shape
        if spec.rank > min(outputs, inputs):
            raise UserError(
                f"model.lora.rank: {spec.rank} is above the rank of {target}, which is {outputs} x {inputs}: the adapters "
                f"would be larger than what they change; give at most {min(outputs, inputs)}"
            )


@contextmanager
def without_adapters(causal_lm: nn.Module) -> Iterator[None]:
    """Inside of the block the model is its base: adapters and their dropout are switched off.

    Not by peft's `enable_adapters`, which also freezes them: DeepSpeed has noted which parameters are trained.
    """
    layers = [module for module in causal_lm.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class AdaptedWeights:
    """A `WeightSource` of base and adapters: A uniform as `nn.Linear` initialises it, drawn by name; B zero."""

    def __init__(self, base: WeightSource, *, seed: int) -> None:
        self._base = base
        self._seed = seed

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`."""
        if ".lora_B." in name:
            return torch.zeros(stop - start)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            generator = named_generator(self._seed, name)
            return torch.empty(shape.numel()).uniform_(-bound, bound, generator=generator)[start:stop]
        return self._base.read(base_name(name), shape, start, stop)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name of a base parameter in the model without adapters."""
    return name.replace(_BASE, ".")


def adapters_by_base_name(causal_lm: nn.Module) -> Iterator[tuple[str, tuple[Any, Any, float]]]:
    """Yield (base weight's name, (A [r, in], B [out, r], scaling))."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
            yield f"{name}.weight", (a, b, module.scaling[_ADAPTER])


def merge_adapters(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """base + scaling · B A, in fp32."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scaling)
