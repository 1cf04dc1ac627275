"""A plan as text for a terminal: the verdict first, then tables. No formula is here: all numbers come from the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

from rich.console import Console

from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.deepspeed_file import bucket_size
from bico_ds.planner.communication import LINK_EFFICIENCY
from bico_ds.planner.decisions import NOTABLE_SHARE, Change, Decisions, largest_item, most_micro_batch
from bico_ds.planner.items import Item, total
from bico_ds.planner.memory import MemoryPlan, Moment
from bico_ds.planner.plan import Plan
from bico_ds.planner.ranges import Range
from bico_ds.planner.report.quantities import GB, GIB, gib, number, percent, span, stored, time
from bico_ds.planner.run_time import Event
from bico_ds.planner.step_time import (
    ATTENTION_EFFICIENCY,
    MEMORY_EFFICIENCY,
    PRODUCT_EFFICIENCY,
    StepTime,
)

# In a ring of more ranks bf16 loses a part of what they agree on: docs/benchmarks/communication.md.
MOST_RANKS_IN_BF16 = 128
_COLORS = {"fits": "green", "may not fit": "yellow", "does not fit": "red"}


def fit_word(memory: MemoryPlan) -> str:
    """`fits`, `may not fit` (the range has the device's memory in it) or `does not fit`."""
    return "fits" if memory.fits else "does not fit" if memory.cannot_fit else "may not fit"


def verdict(plan: Plan, change: Change | None) -> str:
    """One sentence on memory, with the `change` that would fit where it does not, and one on time and cost."""
    return " ".join([f"{plan.recipe.name} on {where(plan)} {_memory_verdict(plan, change)}", _run(plan)])


def warnings(plan: Plan) -> list[str]:
    """What takes more than its share of the run, and what else a reader should not miss."""
    found = []
    for event in plan.run.events:
        if event.share.high > NOTABLE_SHARE:
            takes = "takes" if event.share.low > NOTABLE_SHARE else "may take"
            found.append(
                f"{event.name}, {_times(plan, event)}: {takes} {percent(event.share)} of the run's time, "
                f"{time(event.seconds)} each"
            )
    found += _gradients_in_fp32(plan)
    made_for, ranks = plan.recipe.distributed.world_size, plan.deployment.ranks
    if made_for is not None and made_for != ranks:
        found.append(
            f"the recipe is made for {made_for} ranks, and a run on {ranks} is refused; "
            f"set distributed.world_size={ranks}"
        )
    return found


def _gradients_in_fp32(plan: Plan) -> Iterator[str]:
    """Where nodes wait for each other and half of what the gradients send would do, the option that sends it."""
    deployment = plan.deployment
    is_in_fp32 = deployment.zero.communication_bytes == 4 and plan.recipe.model.dtype == "bf16"
    if deployment.nodes == 1 or deployment.ranks > MOST_RANKS_IN_BF16 or not is_in_fp32:
        return
    step = max(plan.steps, key=lambda step: _sent(step).low / step.seconds.low)
    gradients = _sent(step, only_gradients=True)
    computed = step.products + step.elementwise
    if _sent(step).low > computed.low and gradients.low > NOTABLE_SHARE * step.seconds.low:
        yield (
            f"a step of {step.objective} computes for {time(computed)} and sends for {time(_sent(step))}, of which "
            f"gradients in fp32 are {time(gradients)}, and half of that with "
            "--set deepspeed.overrides.communication_data_type=bf16 (its error: docs/benchmarks/communication.md)"
        )


def _sent(step: StepTime, *, only_gradients: bool = False) -> Range:
    found = (transfer.seconds for transfer in step.transfers if transfer.reduces or not only_gradients)
    return reduce(Range.__add__, found, Range.exactly(0))


def print_plan(plan: Plan, decisions: Decisions, notes: Sequence[str], console: Console) -> None:
    """Everything, for a reader, on a console without markup: formulas have brackets."""
    say = console.print
    say(f"{plan.recipe.name} on {where(plan)}")
    say(_memory_verdict(plan, decisions.change), style=_COLORS[fit_word(plan.memory)])
    say(_run(plan))
    for line in warnings(plan):
        say(f"warning: {line}", style="yellow")
    for title, table in _tables(plan, decisions).items():
        say(f"\n{title}", style="bold")
        console.print(table)
    say(f"\n{_micro_batch(plan, decisions)}")
    for line in [*assumptions(plan), *notes]:
        say(f"note: {line}")


def _tables(plan: Plan, decisions: Decisions) -> dict[str, FittingTable]:
    """By their titles."""
    peak = plan.memory.peak
    by_nodes = {str(other.deployment.nodes): other for other in decisions.nodes}
    tables = {
        f"Memory of a device at its peak, {_moment(peak)}, GiB": _items_table(peak.items, unit=GIB),
        "Memory of a device at each moment, GiB": _moments_table(plan),
        "A step of each objective": _steps_table(plan),
        "What stops the training": _events_table(plan),
        "Host memory of a node, GiB": _items_table(plan.host, unit=GIB),
        "NVMe of a node, GB": _items_table(plan.nvme, unit=GB),
        "Disk of the run, GB": _items_table(plan.disk, unit=GB),
        "The same recipe on other nodes": _choices_table("nodes", by_nodes, plan),
        "With other files of ds_configs/": _choices_table("deepspeed.config", decisions.variants, plan),
    }
    return {title: table for title, table in tables.items() if table.row_count}


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, a line each."""
    device = plan.deployment.device
    return [
        *_texts(plan),
        *_comparison(plan),
        *_buckets(plan),
        "packing is taken to fill the bins",
        *_kernels(plan),
        "the host's own time (Python, launches of kernels) is not planned; steps of milliseconds are mostly that",
        f"times are not measured on these devices; of the peaks are assumed: {percent(PRODUCT_EFFICIENCY)} in matrix "
        f"products, {percent(ATTENTION_EFFICIENCY)} in attention, {percent(MEMORY_EFFICIENCY)} of the memory's bandwidth, "
        f"{percent(LINK_EFFICIENCY)} of links; the disk writes {span(plan.disk_bandwidth, unit=GB)} GB/s",
        f"links of a device, each way: {stored(device.link_bandwidth)}/s in its node, "
        f"{stored(device.network_bandwidth)}/s to others",
        f"peaks of {device.title}: {device.source}",
    ]


def _kernels(plan: Plan) -> Iterator[str]:
    """What a GPU's machine is taken to have: here alone it is said (`Case` of planner/rows/case.py, planner/compute)."""
    if plan.deployment.device.kind == "cuda":
        yield (
            "Triton and liger-kernel are taken to be installed (pip install 'bico_ds[gpu]'); without them there is more "
            "to keep and to move around attention, in norms, gates and the head's softmax"
        )


def _texts(plan: Plan) -> Iterator[str]:
    """One line, or one per objective where they draw from different sources."""
    for index, batch in enumerate(plan.batches[: len(plan.texts.by_objective) or 1]):
        texts = plan.texts.drawn_by(index)
        whose = f"texts of {batch.objective}" if plan.texts.by_objective else "texts"
        of_epoch = "" if texts.tokens is None else f"; {texts.tokens:,} tokens in a data epoch"
        yield f"{whose}: {texts.source}; on average {number(float(texts.lengths.mean()))} tokens{of_epoch}"


def _comparison(plan: Plan) -> Iterator[str]:
    """What `retention.kl` adds to the plan."""
    for batch in plan.batches:
        if batch.compared_rows or batch.repeats_base:
            more = "a forward pass of the start model, and " if batch.repeats_base else ""
            yield (
                f"retention.kl adds to each {batch.objective} micro-batch {more}the head's products of "
                f"{batch.compared_rows:,.0f} compared rows"
            )


def _buckets(plan: Plan) -> Iterator[str]:
    """How many gradients go together, and why; one rank sends nothing."""
    deployment = plan.deployment
    if deployment.ranks == 1:
        return
    zero = deployment.zero
    automatic = bucket_size(plan.architecture.hidden, ranks=deployment.ranks, nodes=deployment.nodes)
    why = automatic.why if zero.reduce_bucket == automatic.elements else "as configured"
    ahead = f"; gathered ahead: {zero.prefetch_bucket:,}" if zero.stage == 3 else ""
    yield f"gradients reduced together: {zero.reduce_bucket:,} ({why}){ahead}"


def where(plan: Plan) -> str:
    """As in `8 nodes of 8 NVIDIA H100 SXM, 80 GB`."""
    deployment = plan.deployment
    nodes = "1 node" if deployment.nodes == 1 else f"{deployment.nodes} nodes"
    return f"{nodes} of {deployment.ranks_per_node} x {deployment.device.title}"


def _memory_verdict(plan: Plan, change: Change | None) -> str:
    memory, word = plan.memory, fit_word(plan.memory)
    found = (
        f"{word}: {gib(memory.peak.bytes)} of {number(memory.available / GIB)} GiB at the peak, "
        f"{_moment(memory.peak)}"
    )
    if memory.fits:
        return f"{found}."
    largest = largest_item(plan)
    found += f"; the largest item is {largest.name}, {gib(largest.bytes)} GiB"
    if change is None:
        return f"{found}. No change of batch, recomputation, DeepSpeed configuration or nodes makes it fit."
    return f"{found}. With {' '.join(change.words)} it fits, in {gib(change.plan.memory.peak.bytes)} GiB."


def _run(plan: Plan) -> str:
    run, deployment = plan.run, plan.deployment
    if run.steps is None or run.hours is None or run.device_hours is None:
        return (
            f"A step takes {time(run.mean_step_seconds)}; how many steps its epochs have is not known here: "
            "prepare the data, or give --epoch-tokens or --set training.steps=N --set training.epochs=null."
        )
    cost = "" if run.cost is None else f", cost {span(run.cost)}"
    hours = "hours of one device" if deployment.device.kind == "cpu" else "GPU-hours"
    return (
        f"{run.steps:,} steps of {time(run.mean_step_seconds)} take {time(run.hours.times(3600))}, "
        f"{span(run.device_hours)} {hours}{cost}."
    )


def _micro_batch(plan: Plan, decisions: Decisions) -> str:
    now = plan.recipe.training.micro_batch_bins
    if not decisions.micro_batch:
        return "Largest micro-batch that fits: not even one bin."
    tokens = f"{plan.recipe.data.capacity:,} tokens"
    bins = number(decisions.micro_batch)
    if decisions.micro_batch == most_micro_batch(plan.recipe):
        return f"Largest micro-batch that fits: {bins} bins of {tokens} at least, more are not tried (now {now})."
    return f"Largest micro-batch that fits: {bins} bins of {tokens} (now {now})."


def _table(first: str, *columns: str) -> FittingTable:
    table = FittingTable(boxed=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, right=True)
    return table


def _items_table(items: Sequence[Item], *, unit: float) -> FittingTable:
    """A row per item, low and high in units of `unit` bytes, and their sum; no row where there are no items."""
    table = _table("", "low", "high")
    table.add_column("how", style="dim")
    for item in items:
        table.add_row(item.name, *_bounds(item.bytes, unit), item.how)
    if items:
        table.add_row("together", *_bounds(total(items), unit), "", style="bold")
    return table


def _moments_table(plan: Plan) -> FittingTable:
    table = _table("", "low", "high")
    table.add_row("between steps", *_bounds(total(plan.memory.resident), GIB))
    for moment in plan.memory.moments:
        table.add_row(_moment(moment), *_bounds(moment.bytes, GIB))
    return table


def _moment(moment: Moment) -> str:
    return f"{moment.name} ({moment.objective})"


def _bounds(found: Range, unit: float) -> tuple[str, str]:
    return number(found.low / unit), number(found.high / unit)


def _steps_table(plan: Plan) -> FittingTable:
    """A column per objective; rows of a micro-batch, then of a step."""
    table = _table("", *(batch.objective for batch in plan.batches))
    batches, steps = plan.batches, plan.steps
    for label, cells in (
        ("share of the steps", [percent(Range.exactly(batch.probability)) for batch in batches]),
        ("rows of a micro-batch", [f"{batch.rows:,.0f}" for batch in batches]),
        ("  of them live rows", [f"{batch.live_rows:,.0f}" for batch in batches]),
        ("  rows with a loss", [f"{batch.head_rows:,.0f}" for batch in batches]),
        ("documents of a micro-batch", [number(batch.documents) for batch in batches]),
        ("PFLOP of a step, useful", [number(step.flops.useful / 1e15) for step in steps]),
        ("PFLOP of a step, executed", [number(step.flops.executed / 1e15) for step in steps]),
        ("  of them attention", [number(step.flops.attention / 1e15) for step in steps]),
        ("matrix products and attention", [time(step.products) for step in steps]),
        ("elementwise operations", [time(step.elementwise) for step in steps]),
        ("update, and sums of gradients", [time(step.optimizer) for step in steps]),
        *_transfer_rows(plan),
        ("a step", [time(step.seconds) for step in steps]),
        ("tokens/s of a device, kept", [span(step.kept_per_second) for step in steps]),
        ("tokens/s of a device, represented", [span(step.represented_per_second) for step in steps]),
        ("MFU", [percent(step.mfu) for step in steps]),
    ):
        table.add_row(label, *cells)
    return table


def _transfer_rows(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """A row per kind of collective, with the seconds that it takes by itself."""
    for name in dict.fromkeys(transfer.name for step in plan.steps for transfer in step.transfers):
        found = [next((t for t in step.transfers if t.name == name), None) for step in plan.steps]
        cells = ["" if t is None else f"{time(t.seconds)} ({stored(t.bytes)})" for t in found]
        yield name, cells


def _times(plan: Plan, event: Event) -> str:
    """How often; of a run whose steps are not known, every so many steps."""
    if plan.run.steps is None:
        return "now and then"
    return "once" if event.count == 1 else f"{event.count:,} times"


def _events_table(plan: Plan) -> FittingTable:
    table = _table("", "how often", "each", "share of the run")
    table.add_column("how", style="dim")
    for event in plan.run.events:
        table.add_row(event.name, _times(plan, event), time(event.seconds), percent(event.share), event.how)
    return table


def _choices_table(what: str, plans: Mapping[str, Plan], chosen: Plan) -> FittingTable:
    """A row per alternative; the plan's own has a star."""
    money = "GPU-hours" if chosen.price is None else "cost"
    table = _table(what, "memory", "GiB", "tokens/s of a device", "hours", money)
    for name, plan in plans.items():
        run = plan.run
        table.add_row(
            f"{name} *" if plan is chosen else name,
            fit_word(plan.memory),
            gib(plan.memory.peak.bytes),
            span(plan.represented_per_second),
            "" if run.hours is None else span(run.hours),
            "" if (paid := run.device_hours if run.cost is None else run.cost) is None else span(paid),
            style="bold" if plan is chosen else "",
        )
    return table
