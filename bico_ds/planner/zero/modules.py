"""The modules that hold parameters, in the order in which a forward pass runs them: what ZeRO gathers and reduces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from bico_ds.config.schema import LoraSpec
from bico_ds.planner.architecture import Architecture, Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class Parameter:
    """One tensor of weights, equal to itself alone."""

    name: str
    elements: int
    trained: bool

    def share(self, ranks: int) -> int:
        """Elements in each rank's ZeRO-3 partition: padded at the parameter's end."""
        return math.ceil(self.elements / ranks)


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """A module with parameters of its own, equal to itself alone. `layer`: of the decoder, or None.

    `has_backward`: whether a gradient comes to its output; `passes_on`: whether one leaves by its input. DeepSpeed gathers
    a module's weights by the first and releases them by the second.
    """

    name: str
    parameters: tuple[Parameter, ...]
    layer: int | None = None
    has_backward: bool = True
    passes_on: bool = True


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """Of a recipe's `model.lora`, what shapes depend on."""

    rank: int
    targets: tuple[str, ...]


def modules_of(architecture: Architecture, lora: LoraSpec | None) -> tuple[Module, ...]:
    """All modules with parameters, the same ones at each call; a tied head has the embedding's parameter."""
    return _modules(
        architecture, None if lora is None else _Adapters(rank=lora.rank, targets=tuple(lora.targets))
    )


@lru_cache(maxsize=64)
def _modules(architecture: Architecture, lora: _Adapters | None) -> tuple[Module, ...]:
    full, hidden = lora is None, architecture.hidden
    embedding = Parameter(name="embedding", elements=architecture.embedding_parameters, trained=full)
    head = embedding if architecture.tied_head else Parameter(**{**vars(embedding), "name": "head"})
    layers = [module for index in range(architecture.layers) for module in _layer(architecture, lora, index)]
    return (
        Module(name="embedding", parameters=(embedding,), has_backward=full, passes_on=False),
        *layers,
        Module(name="last norm", parameters=(Parameter(name="last norm", elements=hidden, trained=full),)),
        Module(name="head", parameters=(head,)),
    )


def parameters_of(modules: tuple[Module, ...]) -> tuple[Parameter, ...]:
    """All parameters, each once, in the modules' order, which is that of torch's `model.parameters()`."""
    return tuple(dict.fromkeys(parameter for module in modules for parameter in module.parameters))


def _layer(architecture: Architecture, lora: _Adapters | None, index: int) -> Iterator[Module]:
    """Under LoRA nothing before the first adapter has a gradient to pass on."""
    flows = lora is None or index > 0
    by_name = {linear.name: linear for linear in architecture.linears}
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    norms = {"q_proj": ("first norm", architecture.hidden), "gate_proj": ("second norm", architecture.hidden)}
    for names in groups:
        if names[0] in norms:
            yield _norm(*norms[names[0]], index, lora, flows=flows)
        for name in names:
            yield from _linear(by_name[name], index, lora, flows=flows)
        flows = flows or (lora is not None and any(name in lora.targets for name in names))
        if architecture.qk_norms and names[0] == "q_proj":
            for name in ("query norm", "key norm"):
                yield _norm(name, architecture.head_dim, index, lora, flows=flows)


def _norm(name: str, elements: int, layer: int, lora: _Adapters | None, *, flows: bool) -> Module:
    weight = Parameter(name=f"{name} {layer}", elements=elements, trained=lora is None)
    return Module(name=weight.name, parameters=(weight,), layer=layer, has_backward=flows, passes_on=flows)


def _linear(linear: Linear, layer: int, lora: _Adapters | None, *, flows: bool) -> Iterator[Module]:
    """The layer, and behind it peft's two of its adapter."""

    def module(part: str, *sizes: int, trained: bool, has_backward: bool, passes_on: bool) -> Module:
        name = f"{linear.name}{part} {layer}"
        parameters = [
            Parameter(name=f"{name}.{i}", elements=size, trained=trained) for i, size in enumerate(sizes)
        ]
        return Module(
            name=name,
            parameters=tuple(parameters),
            layer=layer,
            has_backward=has_backward,
            passes_on=passes_on,
        )

    sizes = (linear.weight_elements, *((linear.outputs,) if linear.bias else ()))
    yield module("", *sizes, trained=lora is None, has_backward=flows, passes_on=flows)
    if lora is not None and linear.name in lora.targets:
        yield module(" A", lora.rank * linear.inputs, trained=True, has_backward=True, passes_on=flows)
        yield module(" B", lora.rank * linear.outputs, trained=True, has_backward=True, passes_on=True)
