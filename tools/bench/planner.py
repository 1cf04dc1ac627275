#!/usr/bin/env python
"""The planner beside published runs: memory, MFU under each source's own convention, and the predicted time of a step.

    python tools/bench/planner.py [--write] [--json]

No GPU, a few seconds. Nothing of the planner was fitted to these runs: its efficiencies come from other publications
(bico_ds/planner/step_time.py). --write makes docs/benchmarks/planner.md.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import this_checkout  # noqa: F401  first on sys.path
from published_runs import PublishedRun, published_runs

from bico_ds.common.command_line import Command
from bico_ds.common.files import write_atomically
from bico_ds.config.resources import RECIPES
from bico_ds.planner.communication import LINK_EFFICIENCY
from bico_ds.planner.deployment import Deployment, read_zero
from bico_ds.planner.memory import MemoryPlan, device_memory
from bico_ds.planner.ranges import Range
from bico_ds.planner.step_time import (
    ATTENTION_EFFICIENCY,
    MEMORY_EFFICIENCY,
    PRODUCT_EFFICIENCY,
    StepTime,
    step_time,
)
from bico_ds.planner.workload import Texts, micro_batches

PAGE = RECIPES.parent / "docs" / "benchmarks" / "planner.md"
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A published run and our plan of the closest run of ours."""

    run: PublishedRun
    memory: MemoryPlan
    step: StepTime

    @property
    def error(self) -> float:
        """Of the middle of the predicted seconds, as a share of the published ones."""
        return self.step.seconds.middle / self.run.seconds_per_step() - 1

    @property
    def is_within(self) -> bool:
        return self.step.seconds.low <= self.run.seconds_per_step() <= self.step.seconds.high

    @property
    def verdict(self) -> str:
        if self.memory.fits:
            return "yes"
        return "no" if self.memory.cannot_fit else "perhaps"


def compared(run: PublishedRun) -> Compared:
    """Plan a run's closest relative: ZeRO-3 over all GPUs, with next-token prediction of full sequences."""
    recipe, architecture = run.recipe(), run.architecture
    zero = read_zero(
        recipe,
        hidden_size=architecture.hidden,
        ranks=run.gpus,
        ranks_per_node=run.ranks_per_node,
        on_cuda=True,
    )
    deployment = Deployment(
        device=run.device,
        nodes=run.gpus // run.ranks_per_node,
        ranks_per_node=run.ranks_per_node,
        zero=zero,
    )
    texts = Texts(lengths=np.full(1, run.length), tokens=None, source="full sequences")
    batches = micro_batches(recipe, texts)
    (step,) = (step_time(recipe, architecture, deployment, batch) for batch in batches)
    return Compared(run=run, memory=device_memory(recipe, architecture, deployment, batches), step=step)


def rows(found: list[Compared]) -> list[dict[str, Any]]:
    """One row per figure, for machines."""
    lines = []
    for one in found:
        run, mfu = one.run, one.run.mfu_of_tokens()
        if mfu is not None and run.mfu is not None:
            lines.append(_row(f"{run.name}: MFU of its tokens per second", mfu, run.mfu, "share"))
        lines.append(_row(f"{run.name}: step", one.step.seconds.middle, run.seconds_per_step(), "s"))
    return lines


def _row(name: str, ours: float, other: float, unit: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "other": other, "unit": unit, "ratio": ours / other}


def page(found: list[Compared]) -> str:
    """The page of the documentation."""
    within = sum(one.is_within for one in found)
    errors = sorted(abs(one.error) for one in found)
    return f"""# Benchmark: the planner

```bash
python tools/bench/planner.py --write      # makes this page; no GPU
```

**No run of ours on GPUs is among these**: they are published runs of others, planned as the closest run of this project,
which has neither tensor nor context parallelism. {within} of {len(found)} published steps lie within the predicted
range, whose middle is {errors[0]:.0%} to {errors[-1]:.0%} off. The efficiencies were not fitted to these runs.

## Time of a step

Published: from the source's tokens per second and GPU. Predicted: the lower bound hides all transfers behind the products,
the upper one hides none. Error: of the range's middle.

{_time_table(found)}

## MFU from the published tokens per second

Each under its source's own convention; the peak is 989.4 TFLOP/s.

{_mfu_table(found)}

## Memory of a GPU

The planner's peak of our closest run, in GB, without and with all that its upper bound allows for.

{_memory_table(found)}

## Sources, and what they did otherwise

{_source_list(found)}

## What is assumed

Of data-sheet peaks are reached: {_percent(PRODUCT_EFFICIENCY)} by products, {_percent(ATTENTION_EFFICIENCY)} by
attention, {_percent(MEMORY_EFFICIENCY)} of the memory's bandwidth by everything else, {_percent(LINK_EFFICIENCY)} of a
link's. Sources stand in [step_time.py](../../bico_ds/planner/step_time.py) and
[communication.py](../../bico_ds/planner/communication.py). The time of the host between kernels is not planned.

## What was measured here

Without a GPU, by tests:

```bash
pytest tests/planner                                        # FLOPs equal torch's own count; memory of live tensors
pytest -m slow tests/distributed/test_planned_communication.py          # bytes that two ranks send
pytest -s -m distributed tests/distributed/test_planned_memory.py       # bytes of real ranks' tensors, all 23 cases
```

Memory of real ranks, planned over measured, less 1. 2026-11-27, two shared CPU cores, torch 2.13 and DeepSpeed 0.19.8, 1
and 2 ranks over gloo; an allocator in the place of torch's counts in all threads. Models of 3 to 7 layers, 96 to 224 wide:
states weigh more there than in a large run. Of the last steps the one with the least. Left out is what oneDNN's products in
the head allocate for themselves: at times a small weight once more, a few megabytes of a large one.

| cases | between steps | forward | backward | update |
|---|---|---|---|---|
| 12: ZeRO 2 and 3, both objectives, recomputation, LoRA | 0.0 % | -0.7 to +0.1 % | -0.4 to +2.9 % | 0.0 to +0.1 % |
| 11 others, with hpZ, offload, a tied head, 3 micro-batches | 0.0 % | -0.5 to +2.7 % | -6.2 to +10.9 % | -0.8 to +1.6 % |

Above 5 % are 4 of the 11, all with buckets that a layer fills several times, in the backward pass: ZeRO-2 with a tied head
(+10.9 %: the most rows and the most gradients of a layer are added, and are not there together), with 3 micro-batches
(-6.2 %), and with LoRA and recomputation (+5.5 %; ZeRO-3: +5.2 %). Of the last three the tensors are not known.
"""


def _time_table(found: list[Compared]) -> str:
    lines = ["| run | published, s | predicted, s | within | error |", "|---|---|---|---|---|"]
    for one in found:
        seconds, published = one.step.seconds, one.run.seconds_per_step()
        within = "yes" if one.is_within else "no"
        lines.append(
            f"| {one.run.name} | {published:.2f} | {_span(seconds, '.2f')} | {within} | {one.error:+.0%} |"
        )
    return "\n".join(lines)


def _mfu_table(found: list[Compared]) -> str:
    lines = ["| run | tokens/s/GPU | convention | published | from its tokens |", "|---|---|---|---|---|"]
    for one in found:
        run, mfu = one.run, one.run.mfu_of_tokens()
        published = "none" if run.mfu is None else f"{run.mfu:.1%}"
        computed = "" if mfu is None else f"{mfu:.1%}"
        lines.append(
            f"| {run.name} | {run.tokens_per_second:,.0f} | {run.convention} | {published} | {computed} |"
        )
    return "\n".join(lines)


def _memory_table(found: list[Compared]) -> str:
    lines = ["| run | planned | there is | fits |", "|---|---|---|---|"]
    for one in found:
        planned, there = _span(one.memory.peak.bytes.times(1 / GB), ".1f"), one.memory.available / GB
        lines.append(f"| {one.run.name} | {planned} | {there:.1f} | {one.verdict} |")
    return "\n".join(lines)


def _source_list(found: list[Compared]) -> str:
    return "\n".join(f"- **{one.run.name}**: {one.run.source}. There: {one.run.differs}." for one in found)


def _span(values: Range, form: str) -> str:
    low, high = f"{values.low:{form}}", f"{values.high:{form}}"
    return low if low == high else f"{low} – {high}"


def _percent(share: Range) -> str:
    return f"{share.low:.0%} to {share.high:.0%}"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="make docs/benchmarks/planner.md")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(options: Namespace) -> None:
    """Plan all runs, print the page, and with --json a last line for machines."""
    found = [compared(one) for one in published_runs()]
    text = page(found)
    print(text)
    if options.write:
        write_atomically(PAGE, text)
    if options.json:
        print(json.dumps({"rows": rows(found)}))


main = Command(description=__doc__, add_options=add_options, run=run)


if __name__ == "__main__":
    main.start()
