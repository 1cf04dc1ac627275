#!/usr/bin/env python
"""What a micro-batch launches, reads, writes and multiplies at Llama-3-8B's shape: counted on the meta device, not measured.

    python tools/bench/step_traffic.py [--rows 8192] [--length 2048] [--write] [--json]

No GPU and no memory, half a minute. Forward and backward with every layer recomputed: what a layer costs is the difference
between models of three layers and of two. Both sides run on the path that a GPU takes; before: torch's formulas around the
flash kernels and Hugging Face's modules; after: this project's Triton ops and liger-kernel's. --write makes
docs/benchmarks/traffic.md.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
import torch
from count_operations import FLASH, PRODUCTS, Cost, Operations
from torch import nn

from bico_ds.attention import backend, backends
from bico_ds.attention.layout import build_layout
from bico_ds.batch import PackedBatch
from bico_ds.common.command_line import Command
from bico_ds.common.files import write_atomically
from bico_ds.config.arguments import positive
from bico_ds.config.load import load_recipe
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.config.resources import RECIPES
from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model import build, head
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.elementwise_kernels import without_kernels
from bico_ds.model.head_softmax import TorchSoftmax
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.planner.compute.attention import FLASH as FLASH_KERNEL
from bico_ds.planner.compute.attention import TRITON

META = torch.device("meta")
PAGE = RECIPES.parent / "docs" / "benchmarks" / "traffic.md"
GB, TFLOP = 1e9, 1e12
OBJECTIVES: dict[str, NextTokenPrediction | MaskDenoising] = {
    "NTP": NextTokenPrediction(spec=NtpSpec()),
    "BICO": MaskDenoising(spec=BicoSpec(mask=MaskSpec(rate=0.15)), placeholder_id=0),
}
FLASH_KERNELS = "flash kernels"
AROUND = "around the two passes"
LIVE = "live rows"
NORMS = "norms, residual, sums of gradients"
GATE = "gate"
PROJECTIONS = "products of linear layers"
HEAD = "head: softmax and loss"
HEAD_PRODUCTS = "head: products"
ENDS = "embedding, tables, rows with a loss"
OF_A_LAYER = (FLASH_KERNELS, AROUND, LIVE, NORMS, GATE, PROJECTIONS)
OF_A_MICRO_BATCH = (HEAD, HEAD_PRODUCTS, ENDS)
# What serves the live rows beside the flash kernel.
OF_LIVE_ROWS = ("dense_forward", "dense_backward", "triton_forward", "triton_backward")


@dataclass
class Places:
    """Says where in the model an operation runs, in the forward pass, a recomputation, or the backward pass.

    Within a module, by hooks; in the backward pass by the autograd node that runs, whose sequence number tells within which
    module it was made.
    """

    model: TrainableModel
    _entered: list[tuple[str, int]] = field(default_factory=list)
    _made: list[tuple[int, int, str]] = field(default_factory=list)  # inner modules before those around them

    @contextmanager
    def watched(self) -> Iterator[None]:
        decoder = self.model.causal_lm.model
        places: list[tuple[nn.Module, str]] = [(self.model.causal_lm.lm_head, HEAD), (decoder.norm, NORMS)]
        for layer in decoder.layers:
            norms = (layer, layer.input_layernorm, layer.post_attention_layernorm)
            places += [*((module, NORMS) for module in norms), (layer.self_attn, AROUND), (layer.mlp, GATE)]
        hooks = [hook for module, place in places for hook in self._watch(module, place)]
        with ExitStack() as stack:
            for name in OF_LIVE_ROWS:
                stack.enter_context(patch.object(backend, name, self._within(LIVE, getattr(backend, name))))
            # Sums that cross the layers' borders.
            stack.enter_context(patch.object(build, "enter", self._within(NORMS, build.enter)))
            yield
        for hook in hooks:
            hook.remove()

    def _within(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            self._entered.append((place, _next_node()))
            found = function(*args, **settings)
            self._entered.pop()
            return found

        return run

    def _watch(self, module: nn.Module, place: str) -> list[Any]:
        def enter(*_: Any) -> None:
            self._entered.append((place, _next_node()))

        def leave(*_: Any) -> None:
            place, first = self._entered.pop()
            self._made.append((first, _next_node(), place))

        # A recomputation leaves a layer by an exception, once it has what the backward pass needs.
        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def group_of(self, name: str) -> str:
        """The group of an operation of this name that runs now."""
        if name in FLASH:
            return FLASH_KERNELS
        place = self._entered[-1][0] if self._entered else self._of_node(name)
        if name in PRODUCTS and place != LIVE:
            return HEAD_PRODUCTS if place == HEAD else PROJECTIONS
        return place

    def _of_node(self, name: str) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return ENDS
        number = node._sequence_nr()
        place = next((place for first, end, place in self._made if first <= number < end), ENDS)
        # The engine adds the gradients of what several projections read, as a part of the last one's node.
        is_sum = name.startswith("add") and not node.name().startswith("_PackedAttention")
        return NORMS if is_sum and place in (AROUND, GATE) else place


def _next_node() -> int:
    """The sequence number that the next autograd node will get."""
    return int(torch._C._autograd._get_sequence_nr())


def batch_of(kind: str, spec: ModelSpec, *, rows: int, length: int) -> PackedBatch:
    """Documents of `length` random tokens, as many as fit `rows`, with the layout that a GPU gets."""
    random = np.random.default_rng(0)
    documents = [
        Document(token_ids=random.integers(5, 1000, length), source=0, id=number)
        for number in range(rows // length)
    ]
    batch = OBJECTIVES[kind].build(Documents.of(documents), BatchKey(seed=0, epoch=0))
    assert spec.config is not None
    head_dim = spec.config["hidden_size"] // spec.config["num_attention_heads"]
    resolved = backends.resolve("auto", torch.bfloat16, head_dim, META)
    assert resolved is not None
    return replace(batch, layout=build_layout(batch.plan, resolved.policy))


def count(kind: str, *, layers: int, rows: int, length: int) -> dict[str, Cost]:
    """What a micro-batch's forward and backward pass cost, by the groups above."""
    spec = load_recipe("llama3_8b_bico").model
    assert spec.config is not None
    config = {**spec.config, "num_hidden_layers": layers}
    spec = spec.model_copy(update={"path": None, "config": config, "activation_checkpointing": 1})
    model = build_model(spec, seed=1, ds_config=None, device=META).train()
    batch = batch_of(kind, spec, rows=rows, length=length)
    places = Places(model)
    with places.watched(), Operations(places.group_of) as operations:
        model(batch.to(META)).loss.backward()
    found = {group: operations.total(group) for group in (*OF_A_LAYER, *OF_A_MICRO_BATCH)}
    per_pair = 2 * layers * config["hidden_size"]
    found[FLASH_KERNELS] += Cost(
        flops=per_pair * (2 * FLASH_KERNEL.forward + FLASH_KERNEL.backward) * _flash_pairs(batch)
    )
    found[LIVE] += Cost(flops=per_pair * (2 * TRITON.forward + TRITON.backward) * _triton_pairs(batch))
    return found


def _flash_pairs(batch: PackedBatch) -> int:
    """Pairs of a query and a key that it sees, of both passes, per head and layer."""
    assert batch.layout is not None
    ends = [cu for group in batch.layout.flash for cu in (group.plan.cu_seqlens, group.plan.flip_cu_seqlens)]
    return sum(n * (n + 1) // 2 for cu in ends for n in cu.diff().tolist())


def _triton_pairs(batch: PackedBatch) -> int:
    """Of the Triton kernels for live rows, which see every kept key of their documents."""
    assert batch.layout is not None
    if batch.layout.blocks is None:
        return 0
    begin, end, _, keys = batch.layout.blocks.query_blocks.long().T
    return int(((end - begin) * keys).sum())


@contextmanager
def formulas() -> Iterator[None]:
    """Within, the path is that of before: torch's formulas, and Hugging Face's modules."""
    with (
        patch.object(backends, "triton_refusal", lambda *_: "is left out"),
        patch.object(head, "head_softmax", TorchSoftmax),
        without_kernels(),
    ):
        backends.resolve.cache_clear()
        yield
    backends.resolve.cache_clear()


SIDES: dict[str, Callable[[], AbstractContextManager[None]]] = {"before": formulas, "after": nullcontext}


def costs(kind: str, *, rows: int, length: int) -> dict[str, Cost]:
    """Of one decoder layer, by `OF_A_LAYER`; and of what a micro-batch has once, by `OF_A_MICRO_BATCH`."""
    three, two = (count(kind, layers=layers, rows=rows, length=length) for layers in (3, 2))
    return {group: three[group] - two[group] if group in OF_A_LAYER else two[group] for group in two}


Counted = dict[str, dict[str, dict[str, Cost]]]  # by objective, side and group


def count_all(options: Namespace) -> Counted:
    found: Counted = {}
    for kind in OBJECTIVES:
        found[kind] = {}
        for side, path in SIDES.items():
            with path():
                found[kind][side] = costs(kind, rows=options.rows, length=options.length)
    return found


def json_rows(found: Counted) -> list[dict[str, Any]]:
    """Ours is after, the other before; launches and GB."""
    rows = []
    for kind, sides in found.items():
        for group, after in sides["after"].items():
            before = sides["before"][group]
            of = f"{kind}, {'layer' if group in OF_A_LAYER else 'micro-batch'}: {group}"
            for unit, ours, other in (
                ("launches", after.launches, before.launches),
                ("GB", after.bytes / GB, before.bytes / GB),
            ):
                ratio = other / ours if ours else None
                rows.append({"name": of, "ours": ours, "other": other, "unit": unit, "ratio": ratio})
    return rows


def table(sides: dict[str, dict[str, Cost]]) -> str:
    """One objective's, as Markdown."""
    lines = ["| | launches | GB | TFLOP of products |", "|---|---|---|---|"]
    for groups, whole in ((OF_A_LAYER, "**a layer**"), (OF_A_MICRO_BATCH, "")):
        for group in groups:
            lines.append(_line(group, [side[group] for side in sides.values()]))
        if whole:
            lines.append(_line(whole, [_sum(side, groups) for side in sides.values()]))
    return "\n".join(lines)


def _sum(costs: dict[str, Cost], groups: tuple[str, ...]) -> Cost:
    return sum((costs[group] for group in groups), Cost())


def _line(name: str, found: list[Cost]) -> str:
    cells = [
        _change(f"{cost.launches:,}" for cost in found),
        _change(f"{cost.bytes / GB:.2f}" for cost in found),
        _change(f"{cost.flops / TFLOP:.2f}" if cost.flops else "" for cost in found),
    ]
    return f"| {' | '.join([name, *cells])} |"


def _change(texts: Iterable[str]) -> str:
    """Before and after, or what both are."""
    return " → ".join(dict.fromkeys(texts))


def page(found: Counted, options: Namespace) -> str:
    tables = "\n\n".join(f"## {kind}\n\n{table(sides)}" for kind, sides in found.items())
    return f"""# Benchmark: what a step launches, moves and multiplies

```bash
python tools/bench/step_traffic.py --write
```

**Counted, not measured**, on the meta device; `docs/benchmarks/gpu.md` has an H200's times.
Llama-3-8B's shape in bf16, {options.rows} rows of
documents of {options.length} tokens, forward and backward with every layer recomputed; BICO masks 15 %. A layer is the
difference between models of three and of two; the lines below it are of a micro-batch. Before → after: torch's formulas
around the flash kernels and Hugging Face's modules → this project's Triton ops and liger-kernel's.

{tables}

## How it is counted

A launch reads each input once and writes each result once, of an indexed tensor the rows that are taken; views cost
nothing. Ops of ours count as they state (`bico_ds/common/traffic.py`), ATen's as `tools/bench/count_operations.py` says.
What caches save or blocks read twice is not seen. TFLOP: two per multiplication with its addition; of flash kernels, by
arithmetic, in visible pairs only: 2 products forward, 2 again, 5 backward; of the Triton kernels 7 backward.

The first count that this one was made to check had 35 GB in a BICO layer, 14 of them of attention in 208 kernel calls, 27 GB
in an NTP layer, and 13.3 and 11.7 TFLOP of products. Bytes and products before are the same here: the 14 GB are those of
the two passes, the live rows and the flash kernels. The calls are {_attention_launches(found)}: fills and copies of small
tensors count, too.
"""


def _attention_launches(found: Counted) -> int:
    before = found["BICO"]["before"]
    return _sum(before, (FLASH_KERNELS, AROUND, LIVE)).launches


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=8192, help="original tokens (default 8192)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens per document (default 2048)")
    parser.add_argument("--write", action="store_true", help="make docs/benchmarks/traffic.md")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def contradiction(options: Namespace) -> str | None:
    if options.length > options.rows:
        return f"--length: a document of {options.length} tokens does not fit --rows {options.rows}"
    return None


def run(options: Namespace) -> None:
    """Count both objectives on both sides, print the page, and with --json a last line for machines."""
    found = count_all(options)
    text = page(found, options)
    print(text)
    if options.write:
        write_atomically(PAGE, text)
    if options.json:
        print(json.dumps({"rows": json_rows(found)}))


main = Command(description=__doc__, add_options=add_options, run=run, contradiction=contradiction)

if __name__ == "__main__":
    main.start()
