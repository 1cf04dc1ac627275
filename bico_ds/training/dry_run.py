"""What would run: stores, pack plans and first batches are really built; weights, ranks and what needs a GPU are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bico_ds.common.errors import UserError
from bico_ds.common.secrets import text_without_secrets
from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.load import dump_recipe
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamReport
from bico_ds.data.loading.sequences import CutReport
from bico_ds.data.tokenizer import needed_vocabulary
from bico_ds.evaluation.contamination import find_orders
from bico_ds.evaluation.scoring.share import ONE_PROCESS
from bico_ds.model.architecture import check_vocabulary, model_config, parameter_count
from bico_ds.model.build import build_model
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.optim.schedule import check_schedule
from bico_ds.planner.deployment import spread
from bico_ds.planner.devices import Device
from bico_ds.planner.plan import Plan
from bico_ds.runtime import launch_environment
from bico_ds.runtime.distributed import read_ranks
from bico_ds.runtime.run_folder import folder_of_run
from bico_ds.training import assembly
from bico_ds.training.assembly import RunInputs
from bico_ds.training.checks import (
    beyond_context,
    check_backend,
    check_recipe,
    what_may_be_lost,
    without_missing_weights,
)
from bico_ds.training.evaluator import SEARCHED_TOKENS, training_texts
from bico_ds.training.planning import plan_of_run, verdict_lines

SHARED = {"tokens": "tokens", "flops": "FLOPs"}
LOOK_AHEAD = 64  # steps searched for one batch of each objective


def dry_run(recipe: Recipe, *, output_dir: Path | None = None) -> None:
    """Validate the recipe, build the pack plan and rank 0's first step of each objective, and print what would run.

    At the end stands what the planner finds for the recipe's `distributed.gpu`, whatever this machine is. An objective
    whose first step comes after `LOOK_AHEAD` steps is left out. The number of ranks is `distributed.world_size`, else
    WORLD_SIZE of the environment, else 1; all ranks but the first return at once. Raises `UserError` for what training
    would refuse, as far as this machine can tell, and for a GPU that is not known.
    """
    if launch_environment.rank() != 0:
        return
    console = Console(soft_wrap=True)
    console.print(dump_recipe(recipe), highlight=False, markup=False)
    world_size = recipe.distributed.world_size or launch_environment.world_size()
    planned = without_missing_weights(recipe)
    check_recipe(planned, world_size=world_size, on_cuda=False, run_folder=folder_of_run(recipe, output_dir))
    config = model_config(planned.model)
    build_model(
        planned.model, seed=recipe.seed, ds_config=None, device="meta", longest_document=recipe.data.capacity
    )
    inputs = assembly.open_inputs(recipe, weights_needed=False)
    stands_in = (
        planned is not recipe
        and recipe.model.tokenizer is None
        and inputs.tokenizer_path != assembly.store_tokenizer(recipe)
    )
    if not stands_in:
        check_vocabulary(
            config.vocab_size,
            needed_vocabulary(inputs.tokenizer, config.vocab_size),
            tokenizer=str(inputs.tokenizer_path),
        )
    share = RankShare(world_size=world_size, micro_batch_bins=recipe.training.micro_batch_bins)
    loader = assembly.build_loader(recipe, inputs, share)
    try:
        steps = assembly.total_steps(recipe, loader)
        check_schedule(recipe.schedule, steps)
        warnings = loader.check_targets()
        console.print(_table(planned, world_size, parameter_count(config), steps, loader, inputs))
        for note in (beyond_context(planned, loader.report()), what_may_be_lost(recipe)):
            if note is not None:
                console.print(f"note: {note}", highlight=False, markup=False)
        verdict = verdict_lines(planned, lambda device: _plan(planned, loader, device, world_size))
    finally:
        loader.close()
    if not stands_in:
        warnings += assembly.export_warnings(inputs, config)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    if planned is not recipe:
        console.print(
            f"note: {text_without_secrets(_note(recipe, stands_in))}", highlight=False, markup=False
        )
    for line in verdict:
        console.print(line, highlight=False, markup=False)


def _plan(recipe: Recipe, loader: ElasticLoader, device: Device, world_size: int) -> Plan:
    nodes, ranks_per_node = spread(world_size, device.per_node)
    return plan_of_run(recipe, loader, device, nodes=nodes, ranks_per_node=ranks_per_node)


def _note(recipe: Recipe, stands_in: bool) -> str:
    note = f"model.path '{recipe.model.path}' is not on this machine; planned from model.config alone"
    if stands_in:
        note += ", tokens and steps counted with the embedded task's tokenizer: the model's own gives other numbers"
    return note


def _table(
    recipe: Recipe, world_size: int, parameters: int, steps: int, loader: ElasticLoader, inputs: RunInputs
) -> FittingTable:
    table = FittingTable(title=f"{recipe.name}: what would run", show_header=False)
    table.add_column("")
    table.add_column("")
    batch, micro = recipe.training.global_batch_bins, recipe.training.micro_batch_bins
    accumulation = micro_batches_per_rank(batch, micro, world_size)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("precision, backend", f"{recipe.model.dtype}, {_backend(recipe)}")
    table.add_row("DeepSpeed", str(recipe.deepspeed.config))
    table.add_row("ranks", f"{world_size}")
    table.add_row("steps", f"{steps:,}")
    table.add_row(
        "global batch", f"{batch} bins = {world_size} ranks x {accumulation} micro-batches x {micro} bins"
    )
    table.add_row(
        "tokens per step", f"at most {batch * recipe.data.capacity:,} ({recipe.data.capacity:,} per bin)"
    )
    streams = loader.report()
    for stream in streams:
        table.add_row(
            f"data for {', '.join(stream.objectives)}",
            f"{stream.sequences:,} sequences, {stream.tokens:,} tokens per epoch in {stream.bins:,} bins, "
            f"fill {stream.fill:.3f}",
        )
        for name, cut in stream.cut.items():
            share = f"{stream.shares[name]:.3g} of the tokens, {stream.passes[name]:.3g} passes per epoch"
            table.add_row(f"  source {name}", f"{_counts(cut)}; {share}")
    counts = _steps_by_objective(loader.schedule, steps)
    table.add_row("steps by objective", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if recipe.share_by != "steps":
        table.add_row("probability of a step", _probabilities(recipe, loader.schedule))
    for name in loader.source_names:
        table.add_row(f"passes over {name}", _passes(name, streams, counts, batch))
    for name, asked in _questions(inputs):
        table.add_row(f"task {name}", asked)
    for text in inputs.texts:
        table.add_row(f"text {text.spec.name}", f"{text.tokens:,} tokens predicted at each evaluation")
    for name, line in _first_batches(loader, inputs, min(steps, LOOK_AHEAD)).items():
        table.add_row(f"first {name} step, rank 0", line)
    return table


def _questions(inputs: RunInputs) -> Iterator[tuple[str, str]]:
    """By task how many questions are asked, and how many of them the training texts answer already."""
    texts = training_texts(inputs)
    found = find_orders(inputs.tasks, texts, ONE_PROCESS) if texts.tokens <= SEARCHED_TOKENS else None
    for task in inputs.tasks:
        if found is None:
            answered = "the training texts are too long to be searched here: bico-ds evaluate --train does it"
        else:
            count = sum(order in ("same", "both") for order in found[task.name])
            answered = f"the training texts answer {count:,} of them already, in the order asked"
        yield task.name, f"{len(task):,} questions; {answered}"


def _steps_by_objective(schedule: ObjectiveSchedule, steps: int) -> dict[str, int]:
    counts = {objective.name: 0 for objective in schedule.objectives}
    for index in schedule.indices(0, steps):
        counts[schedule.objectives[index].name] += 1
    return counts


def _probabilities(recipe: Recipe, schedule: ObjectiveSchedule) -> str:
    """Those of steps, beside the recipe's, which are shares of something else."""
    triples = zip(schedule.objectives, schedule.probabilities, recipe.objectives, strict=True)
    return ", ".join(
        f"{objective.name} {probability:.3g} for {spec.probability:.3g} of the {SHARED[recipe.share_by]}"
        for objective, probability, spec in triples
    )


def _passes(source: str, streams: list[StreamReport], steps: dict[str, int], global_batch_bins: int) -> str:
    """Passes over a source in the run, all objectives together and by objective, and the updates whose objective has it."""
    by_objective = {
        name: steps[name] * global_batch_bins / stream.bins * stream.passes[source]
        for stream in streams
        for name in stream.objectives
        if source in stream.passes
    }
    each = ", ".join(f"{name} {passes:.3g} in {steps[name]:,}" for name, passes in by_objective.items())
    updates = sum(steps[name] for name in by_objective)
    return f"{sum(by_objective.values()):.3g} in {updates:,} updates ({each})"


def _counts(cut: CutReport) -> str:
    """What became of a source's documents, so that no loss goes unnoticed."""
    lost = [
        f"{count:,} {what}"
        for what, count in (
            (f"split into {cut.pieces:,} pieces", cut.split),
            ("truncated", cut.truncated),
            ("dropped", cut.dropped),
        )
        if count
    ]
    lost += [f"{cut.lost_tokens:,} tokens lost"] if cut.lost_tokens else []
    return "; ".join([f"{cut.documents:,} documents, {cut.tokens:,} tokens", *lost])


def _backend(recipe: Recipe) -> str:
    """The attention backend as it would be on this machine; the run's may be another."""
    device = read_ranks().device
    asked = recipe.model.attention_backend
    try:
        check_backend(recipe, device)
    except UserError as error:
        return f"attention {asked}, not on this machine ({error})"
    return f"attention {asked} (runs on this machine's {device.type})"


def _first_batches(loader: ElasticLoader, inputs: RunInputs, steps: int) -> dict[str, str]:
    """By objective, a line on the batches of its first step within `steps`."""
    lines: dict[str, str] = {}
    for step in range(steps):
        share = loader.step(step)
        batches, name = share.batches, share.objective
        if name not in lines:
            rows = sum(len(batch.input_ids) for batch in batches)
            represented = sum(batch.represented_tokens for batch in batches)
            live = sum(batch.plan.num_live for batch in batches)
            targets = sum(len(batch.targets) for batch in batches)
            lines[name] = (
                f"step {step}: {represented:,} tokens represented, {rows:,} rows through the model "
                f"({live:,} live rows), {targets:,} targets"
            )
        if len(lines) == len(inputs.schedule.objectives):
            break
    return lines
