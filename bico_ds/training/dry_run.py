"""What would run: stores, pack plans and first batches are really built; weights, ranks and what needs a GPU are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bico_ds.checkpoint import record
from bico_ds.cluster.preflight.missing import what_is_missing
from bico_ds.common.errors import UserError
from bico_ds.common.secrets import text_without_secrets
from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamReport
from bico_ds.data.loading.sequences import CutReport
from bico_ds.data.tokenizer import needed_vocabulary
from bico_ds.evaluation.contamination import find_orders
from bico_ds.evaluation.scoring.share import ONE_PROCESS
from bico_ds.model.architecture import check_vocabulary, model_config, parameter_count, with_own_config
from bico_ds.model.build import build_model
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.optim.schedule import check_schedule
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.deployment import Zero, read_zero, spread
from bico_ds.planner.devices import Device
from bico_ds.planner.plan import Plan
from bico_ds.runtime import launch_environment
from bico_ds.runtime.distributed import read_ranks
from bico_ds.runtime.run_folder import RunFolder, folder_of_run
from bico_ds.training import assembly
from bico_ds.training.assembly import RunInputs
from bico_ds.training.callbacks.banner import Banner, missing_rows, plan_row, what_runs
from bico_ds.training.callbacks.console import banner_lines, banner_table
from bico_ds.training.checks import (
    RANKS_PER_NODE,
    beyond_context,
    check_backend,
    check_recipe,
    what_may_be_lost,
    without_missing_weights,
)
from bico_ds.training.evaluator import SEARCHED_TOKENS, training_texts
from bico_ds.training.planning import lines_of, plan_for_gpu, plan_of_run

SHARED = {"tokens": "tokens", "flops": "FLOPs"}
LOOK_AHEAD = 64  # steps searched for one batch of each objective


def dry_run(recipe: Recipe, *, output_dir: Path | None = None) -> None:
    """Validate the recipe, build the pack plan and rank 0's first step of each objective, and print what would run.

    First come ten lines for a reader, in the words of a start, the last of them on what is missing on this machine; then a
    table of details, and what the planner finds for the recipe's `distributed.gpu`, whatever this machine is. An objective
    whose first step comes after `LOOK_AHEAD` steps is left out. The number of ranks is `distributed.world_size`, else
    WORLD_SIZE of the environment, else 1; all ranks but the first return at once. Raises `UserError` for what training
    would refuse, as far as this machine can tell, and for a GPU that is not known; what is missing is printed before.
    """
    if launch_environment.rank() != 0:
        return
    console, run_folder = Console(soft_wrap=True), folder_of_run(recipe, output_dir)
    missing = [*what_is_missing(recipe), *_no_place(run_folder)]
    try:
        _show(console, recipe, run_folder, missing)
    except UserError:
        _print_rows(console, missing_rows(missing))
        raise


def _show(console: Console, recipe: Recipe, run_folder: Path, missing: list[str]) -> None:
    world_size = recipe.distributed.world_size or launch_environment.world_size()
    planned = without_missing_weights(recipe)
    check_recipe(planned, world_size=world_size, on_cuda=False, run_folder=run_folder)
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
        table = _table(planned, world_size, parameter_count(config), steps, loader, inputs)
        plan = plan_for_gpu(planned, lambda device: _plan(planned, loader, device, world_size))
        rows = [
            *_what_runs(recipe, planned, world_size, steps, loader, plan),
            plan_row(plan),
            ("run folder", _place(run_folder, steps)),
            *missing_rows(missing or ["nothing that a start on this machine needs"]),
        ]
        notes = [beyond_context(planned, loader.report()), what_may_be_lost(recipe)]
    finally:
        loader.close()
    _print_rows(console, rows)
    console.print()
    console.print(table)
    if not stands_in:
        warnings += assembly.question_warnings(recipe, inputs)
        warnings += assembly.export_warnings(inputs, config)
    lines = [f"note: {note}" for note in notes if note is not None]
    lines += [f"warning: {warning}" for warning in warnings]
    if planned is not recipe:
        lines.append(f"note: {text_without_secrets(_note(recipe, stands_in))}")
    for line in [*lines, *lines_of(plan)]:
        console.print(line, highlight=False, markup=False)


def _what_runs(
    recipe: Recipe, planned: Recipe, world_size: int, steps: int, loader: ElasticLoader, plan: Plan | str
) -> Banner:
    architecture = read_architecture(with_own_config(planned.model))
    per_node = launch_environment.ranks_per_node() or RANKS_PER_NODE
    nodes, ranks_per_node = spread(world_size, per_node)
    if isinstance(plan, Plan):
        nodes, ranks_per_node = plan.deployment.nodes, plan.deployment.ranks_per_node
    return what_runs(
        recipe,
        architecture=architecture,
        zero=_zero(recipe, architecture.hidden, world_size, ranks_per_node),
        attention=recipe.model.attention_backend,
        ranks=world_size,
        nodes=nodes,
        steps=steps,
        probabilities=loader.schedule.probabilities,
        streams=loader.report(),
    )


def _zero(recipe: Recipe, hidden_size: int, ranks: int, ranks_per_node: int) -> Zero | None:
    """None where DeepSpeed takes a number that the planner cannot calculate with."""
    try:
        return read_zero(
            recipe, hidden_size=hidden_size, ranks=ranks, ranks_per_node=ranks_per_node, on_cuda=False
        )
    except UserError:
        return None


def _place(run_folder: Path, steps: int) -> str:
    folder = RunFolder(run_folder)
    if not folder.is_of_earlier_start():
        return f"{run_folder}, begins"
    last = record.read(folder)
    if last is None:
        return f"{run_folder}, there already: a start goes on from its newest checkpoint"
    if last.step > steps:
        return f"{run_folder}, there already at step {last.step:,}: a start of {steps:,} steps is refused (training.steps)"
    return f"{run_folder}, there already: a start goes on from step {last.step:,}"


def _no_place(run_folder: Path) -> Iterator[str]:
    """Why there can be no folder of this run here."""
    there = next(path for path in (run_folder, *run_folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        yield f"output_dir: there can be no folder '{run_folder}': '{there}' is none; choose another with --output-dir"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir: cannot write into '{there}'; choose another folder with --output-dir"


def _print_rows(console: Console, rows: Banner) -> None:
    if console.is_terminal:
        console.print(banner_table(rows))
        return
    for line in banner_lines(rows):
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
