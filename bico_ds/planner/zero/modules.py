"""The modules of a model in the order in which a forward pass enters them: what ZeRO gathers, prefetches at, and reduces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from bico_ds.config.sections.model import LoraSpec
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
    """A module, with parameters of its own or without, equal to itself alone. `layer`: of the decoder, or None.

    `has_backward`: whether gradients come to its `outputs`; `passes_on`: whether one leaves by its input. DeepSpeed gathers
    a module's weights by each of the first and releases them by the second. `encloses`: how many of the following modules
    run inside it.
    """

    name: str
    parameters: tuple[Parameter, ...] = ()
    layer: int | None = None
    encloses: int = 0
    outputs: int = 1
    has_backward: bool = True
    passes_on: bool = True


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """Of a recipe's `model.lora`, what shapes depend on."""

    rank: int
    targets: tuple[str, ...]


def modules_of(architecture: Architecture, lora: LoraSpec | None) -> tuple[Module, ...]:
    """All modules that DeepSpeed has hooks on and that run, the same ones at each call; a tied head has the embedding's
    parameter. As on a CPU: elsewhere Hugging Face's MLP enters its activation, too, a module without parameters.
    """
    return _modules(
        architecture, None if lora is None else _Adapters(rank=lora.rank, targets=tuple(lora.targets))
    )


@lru_cache(maxsize=64)
def _modules(architecture: Architecture, lora: _Adapters | None) -> tuple[Module, ...]:
    full, hidden = lora is None, architecture.hidden
    embedding = Parameter(name="embedding", elements=architecture.embedding_parameters, trained=full)
    head = embedding if architecture.tied_head else Parameter(**{**vars(embedding), "name": "head"})
    layers = [module for index in range(architecture.layers) for module in _layer(architecture, lora, index)]
    return _enclosed(
        Module(name="model"),
        [
            Module(name="embedding", parameters=(embedding,), has_backward=full, passes_on=False),
            Module(name="rotary tables", has_backward=False),
            *layers,
            Module(
                name="last norm", parameters=(Parameter(name="last norm", elements=hidden, trained=full),)
            ),
            Module(name="head", parameters=(head,)),
        ],
    )


def in_backward(modules: Sequence[Module]) -> list[Module]:
    """The order of a backward pass: reversed, but what encloses others comes before them here, too."""
    found: list[Module] = []
    for module in reversed(modules):
        found.insert(len(found) - module.encloses, module)
    return found


def parameters_of(modules: tuple[Module, ...]) -> tuple[Parameter, ...]:
    """All parameters, each once, in the modules' order, which is that of torch's `model.parameters()`."""
    return tuple(dict.fromkeys(parameter for module in modules for parameter in module.parameters))


def _layer(architecture: Architecture, lora: _Adapters | None, index: int) -> tuple[Module, ...]:
    """A layer, and all but the first norm in the first one, pass a sum on beside what they make (bico_ds/model/swap.py).

    That norm is inside the first layer alone. Under LoRA nothing before the first adapter has a gradient to pass on.
    """
    full, hidden = lora is None, architecture.hidden
    flows = full or index > 0
    first = _norm("first norm", hidden, index, trained=full, flows=flows, outputs=2 if index else 1)
    attention = list(_linears(architecture, lora, index, ("q_proj", "k_proj", "v_proj"), flows=flows))
    flows = flows or _is_adapted(lora, "q_proj", "k_proj", "v_proj")
    if architecture.qk_norms:
        for name in ("query norm", "key norm"):
            attention.append(_norm(name, architecture.head_dim, index, trained=full, flows=flows))
    attention += _linears(architecture, lora, index, ("o_proj",), flows=flows)
    flows = flows or _is_adapted(lora, "o_proj")
    outer = Module(name=f"attention {index}", layer=index, has_backward=flows)
    second = _norm("second norm", hidden, index, trained=full, flows=flows, outputs=2)
    mlp = list(_linears(architecture, lora, index, ("gate_proj", "up_proj"), flows=flows))
    flows = flows or _is_adapted(lora, "gate_proj", "up_proj")
    mlp += _linears(architecture, lora, index, ("down_proj",), flows=flows)
    flows = flows or _is_adapted(lora, "down_proj")
    inner = [
        *_enclosed(outer, attention),
        second,
        *_enclosed(Module(name=f"MLP {index}", layer=index, has_backward=flows), mlp),
    ]
    layer = Module(name=f"layer {index}", layer=index, has_backward=flows, outputs=2)
    return (first, *_enclosed(layer, inner)) if index else _enclosed(layer, [first, *inner])


def _enclosed(outer: Module, inner: Sequence[Module]) -> tuple[Module, ...]:
    return (replace(outer, encloses=len(inner)), *inner)


def _is_adapted(lora: _Adapters | None, *names: str) -> bool:
    return lora is not None and any(name in lora.targets for name in names)


def _norm(name: str, elements: int, layer: int, *, trained: bool, flows: bool, outputs: int = 1) -> Module:
    weight = Parameter(name=f"{name} {layer}", elements=elements, trained=trained)
    return Module(
        name=weight.name,
        parameters=(weight,),
        layer=layer,
        outputs=outputs,
        has_backward=flows,
        passes_on=flows,
    )


def _linears(
    architecture: Architecture, lora: _Adapters | None, layer: int, names: Sequence[str], *, flows: bool
) -> Iterator[Module]:
    by_name = {linear.name: linear for linear in architecture.linears}
    for name in names:
        yield from _linear(by_name[name], layer, lora, flows=flows)


def _linear(linear: Linear, layer: int, lora: _Adapters | None, *, flows: bool) -> Iterator[Module]:
    """The layer; of an adapted one peft's wrapper, and in it behind the layer a dropout and the adapter's two."""

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
    plain = module("", *sizes, trained=lora is None, has_backward=flows, passes_on=flows)
    if lora is None or linear.name not in lora.targets:
        yield plain
        return
    inner = [
        plain,
        module(" dropout", trained=False, has_backward=flows, passes_on=flows),
        module(" A", lora.rank * linear.inputs, trained=True, has_backward=True, passes_on=flows),
        module(" B", lora.rank * linear.outputs, trained=True, has_backward=True, passes_on=True),
    ]
    yield from _enclosed(Module(name=f"adapted {plain.name}", layer=layer), inner)
