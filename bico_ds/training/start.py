"""From a recipe to a finished run, phase by phase, every mistake before the expensive part.

`train` is the story: check the recipe; rank 0 alone takes the run folder, makes the stores and chooses the checkpoint; all
ranks join; each builds its trainer (`_build_trainer`); from then on the folder belongs to this start (`_take_over`); the
loop runs (`bico_ds.training.trainer`), and what comes after it is written (`_train_and_export`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store

from bico_ds.checkpoint import record
from bico_ds.checkpoint.best import BestKeeper
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.checkpoint.resume import (
    Resumption,
    StateLayout,
    begins_anew,
    choose,
    manifest_header,
    restore,
    set_aside,
    state_layout,
)
from bico_ds.common.errors import RunError, UserError
from bico_ds.common.files import DISK_ERRORS, atomic_folder
from bico_ds.config.schema import Recipe
from bico_ds.data.exported_tokenizer import ExportedTokenizer, save_tokenizer
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.tokenizer import FastTokenizer
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.export_checkpoint import export_record
from bico_ds.optim.schedule import check_schedule
from bico_ds.runtime import deepspeed_ops, distributed, host_memory
from bico_ds.runtime.lock import FencedError
from bico_ds.runtime.meeting.processes import RankProcesses, are_gone
from bico_ds.runtime.nodes.own_time import OwnTime
from bico_ds.runtime.output.process_output import ProcessOutput, libraries_apart
from bico_ds.runtime.peak_memory import PeakMemory
from bico_ds.runtime.run_folder import RunFolder, State, folder_of_run
from bico_ds.runtime.signals import Interrupted, StopFlag
from bico_ds.runtime.watchdog import Watchdog
from bico_ds.training import assembly
from bico_ds.training.assembly import RunInputs
from bico_ds.training.build_engine import build_engine
from bico_ds.training.callbacks.banner import Banner, banner
from bico_ds.training.callbacks.base import RunStart
from bico_ds.training.callbacks.of_run import callbacks_of_run
from bico_ds.training.checks import (
    beyond_context,
    check_backend,
    check_recipe,
    find_backend,
    refuse_fewer_steps,
    what_may_be_lost,
)
from bico_ds.training.evaluator import Evaluator, refuse_above_limit, texts_before
from bico_ds.training.export.facts import sources_record
from bico_ds.training.export.of_run import export_run
from bico_ds.training.fit import refuse_what_cannot_fit
from bico_ds.training.planning import StartPlan, plan_of_start
from bico_ds.training.profile.profiler import StepProfiler
from bico_ds.training.profile.request import ProfileRequest
from bico_ds.training.profile.table import FOLDER as PROFILE_FOLDER
from bico_ds.training.run import Run
from bico_ds.training.spikes import SpikeDetector
from bico_ds.training.targetless import TargetlessSteps
from bico_ds.training.trainer import Trainer

_logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    *,
    output_dir: Path | None,
    resume: str,
    stop: StopFlag,
    output: ProcessOutput | None = None,
    profile: ProfileRequest | None = None,
) -> State:
    """Train a recipe to its end, or until a stop is agreed. Every rank calls it, and gets the same `done` or `preempted`.

    `output`: where this rank's messages go; None: as Python has them, and no log of the rank. `profile`: which steps are
    recorded, in the folder `profile` of the run's.
    Raises `UserError`, `RunError`, or whatever else failed; the ranks on which nothing failed end a moment later.
    """
    run = _checked_run(recipe, output_dir, stop, output or ProcessOutput())
    if profile is not None and recipe.training.steps is not None:
        profile.check_end(recipe.training.steps)
    ranks, timeout_minutes = run.ranks, recipe.distributed.timeout_minutes
    try:
        store, spare, chosen = _meet(run, resume)
    except Interrupted:
        return "preempted"
    _open_log(run)
    deepspeed_ops.prefer_own_ninja()
    deepspeed_ops.write_readable_architectures()
    if spare is not None:
        deepspeed_ops.open_spare_folder(spare, alone=False)
    watchdog = Watchdog(store, ranks, run.folder, minutes=recipe.distributed.watchdog_minutes)
    run.folder.lock.on_lost = lambda: watchdog.abandon(run.folder.lock.loss())
    try:
        with libraries_apart():
            distributed.join(ranks, store, timeout_minutes=timeout_minutes)
        resumption, run.folder.lock.run_id = distributed.broadcast_object(
            (chosen[0], run.folder.lock.run_id) if chosen else None
        )
        with _disk_failures_told(run.folder):
            state = _train_on_all_ranks(run, resume, resumption, watchdog, profile)
    except BaseException as error:
        cause = watchdog.report(error)
        if ranks.is_first:
            _give_up(run.folder, cause, watchdog)
        raise cause from (None if cause is error else error)
    watchdog.close()
    dist.barrier()
    if ranks.is_first:
        run.folder.close()
    distributed.leave()
    return state


def _meet(run: Run, resume: str) -> tuple[Store, Path | None, list[Resumption | None]]:
    """The ranks' store, once rank 0 has prepared the run; the spare folder of DeepSpeed's operations, where one is needed.

    On rank 0 also the checkpoint that it chose, or None for a start from the beginning; on the others an empty list. Raises
    `Interrupted` where a stop was asked for meanwhile.
    """
    ranks = run.ranks
    store = distributed.connect(ranks, timeout_minutes=run.recipe.distributed.timeout_minutes, stop=run.stop)
    spare = deepspeed_ops.choose_folder(run.folder.path / "native_ops")
    if ranks.local_rank == 0:  # before this rank is let in, and with it any that compiles
        deepspeed_ops.release_abandoned_locks()
    chosen: list[Resumption | None] = []
    distributed.first_alone(
        ranks, store, lambda processes: chosen.append(_prepare(run, resume, processes, spare))
    )
    return store, spare, chosen


def _checked_run(recipe: Recipe, output_dir: Path | None, stop: StopFlag, output: ProcessOutput) -> Run:
    """This rank's part in the run, once the recipe was found to be good; raises `UserError` where it is not."""
    _ignore_warnings()
    ranks = distributed.read_ranks()
    if ranks.device.type == "cpu":
        host_memory.bound_primitive_cache()
    folder = RunFolder(folder_of_run(recipe, output_dir))
    ds_config = check_recipe(
        recipe, world_size=ranks.world_size, on_cuda=ranks.device.type == "cuda", run_folder=folder.path
    )
    policy = check_backend(recipe, ranks.device)
    return Run(
        recipe=recipe,
        ranks=ranks,
        folder=folder,
        stop=stop,
        ds_config=ds_config,
        layout_policy=policy,
        output=output,
    )


def _prepare(run: Run, resume: str, processes: RankProcesses, spare: Path | None) -> Resumption | None:
    """Rank 0, before the others are let in: the lock, the stores, and the checkpoint to resume from.

    `spare`: the folder for compiled operations, where the usual one cannot be used.
    """
    run.folder.open()
    _open_log(run)
    try:
        if resume == "auto":
            record.refuse_lost(run.folder)
        if spare is not None:
            deepspeed_ops.open_spare_folder(spare, alone=True)
        run.folder.check_writable(begins_anew=begins_anew(run.folder, resume))
        with run.stop.interrupting(), _disk_failures_told(run.folder):
            distributed.await_all(
                processes,
                world_size=run.ranks.world_size,
                timeout_minutes=run.recipe.distributed.timeout_minutes,
            )
            stores = assembly.prepare_stores(run.recipe, progress=not run.output.is_quiet)
            assembly.check_teachers(run.recipe, stores)
            resumption = choose(run.folder, resume, run.recipe, _layout(run))
            if resumption is not None and record.is_own(resumption.found.path, run.folder):
                refuse_above_limit(run.recipe.evaluation, run.folder, resumption.step)
            return resumption
    except Interrupted as stopped:
        if gone := processes.gone():  # the launcher stops the others then
            lost = RunError(are_gone(gone))
            _give_up(run.folder, lost)
            raise lost from None
        missing = ", ".join(map(str, processes.missing()))
        run.folder.preempt(
            f"{stopped} in start-up" + f"; without rank {missing}, which had not come" * bool(missing)
        )
        run.folder.close()
        raise
    except BaseException as error:
        _give_up(run.folder, error)
        raise


def _open_log(run: Run) -> None:
    """This rank's log; where an earlier start is recorded, only once nothing can refuse this one (`_train_on_all_ranks`)."""
    if not run.folder.is_of_earlier_start():
        run.output.open_log(run.folder)


@contextlib.contextmanager
def _disk_failures_told(folder: RunFolder) -> Iterator[None]:
    """A full or broken disk is no bug of this program: a `RunError` says what could not be done."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" '{error.filename}'" if error.filename else ""
        raise RunError(
            f"cannot write{where}: {error.strerror} (run folder '{folder.path}'); put that right and give the same command "
            "again: it goes on from the last checkpoint"
        ) from error


def _layout(run: Run) -> StateLayout:
    return state_layout(run.recipe, run.ds_config, run.ranks.world_size)


def _give_up(folder: RunFolder, error: BaseException, watchdog: Watchdog | None = None) -> None:
    """Record why the run failed: at once, and then with what the nodes tell, which takes longer."""
    reason = f"{type(error).__name__}: {error}"
    try:
        folder.fail(reason)
        if watchdog is not None and watchdog.cause is not None:
            folder.fail(reason, **watchdog.facts(watchdog.cause))
    except FencedError:
        pass
    except OSError as failure:
        _logger.warning("WARNING: '%s' does not say so: %s", folder.state_file, failure.strerror)
    with contextlib.suppress(OSError):
        folder.close()


def _train_on_all_ranks(
    run: Run,
    resume: str,
    resumption: Resumption | None,
    watchdog: Watchdog,
    profile: ProfileRequest | None,
) -> State:
    """Everything that needs all ranks, from the stores to the end of the run."""
    inputs = assembly.open_inputs(run.recipe)
    saved = resumption.found.content["state"] if resumption else {}
    before = texts_before(inputs, saved) if resumption else {}
    loader = assembly.build_loader(run.recipe, inputs, _rank_share(run), state=saved.get("loader"))
    steps = assembly.total_steps(run.recipe, loader)
    if resumption is not None:
        refuse_fewer_steps(run.recipe, steps, resumption.found)
    profiled = _profiled_steps(profile, loader, steps) if profile is not None else []
    # While the other ranks wait for what rank 0 finds of the targets.
    planned = plan_of_start(run, loader) if run.ranks.is_first else None
    memory = planned.memory if planned is not None else PeakMemory(run.ranks.device)
    warnings = _check_targets(run, loader)
    trainer = _build_trainer(
        run,
        inputs,
        loader,
        resumption,
        _evaluator(run, inputs, watchdog, before),
        watchdog,
        planned,
        memory,
        steps,
    )
    if profiled:
        folder, tell = run.folder.path / PROFILE_FOLDER, trainer.callbacks.on_message
        trainer.profiler = StepProfiler(profiled, run.ranks, folder, tell)
    if run.ranks.is_first:
        warnings += assembly.question_warnings(run.recipe, inputs)
        warnings += assembly.export_warnings(inputs, trainer.engine.module.config)
    for warning in warnings:
        trainer.callbacks.on_message(f"warning: {warning}")
    for change in loader.changes:
        trainer.callbacks.on_message(f"resumed although it changed: {change}")
    for note in (beyond_context(run.recipe, loader.report()), what_may_be_lost(run.recipe)):
        if note is not None:
            trainer.callbacks.on_note(f"note: {note}")
    start = RunStart(
        recipe=run.recipe,
        first_step=trainer.step,
        total_steps=trainer.total_steps,
        summary={"data": [asdict(stream) for stream in loader.report()]},
        saved=saved.get("callbacks", {}),
        banner=_banner(run, loader, trainer, planned) if planned is not None else (),
    )
    if run.ranks.is_first:
        _take_over(run, resume, resumption, inputs.tokenizer)
    run.output.open_log(run.folder)
    return _train_and_export(trainer, start, inputs.exported_tokenizer)


def _banner(run: Run, loader: ElasticLoader, trainer: Trainer, planned: StartPlan) -> Banner:
    plan, begins = planned.plan, "begins"
    if trainer.step:
        begins = f"goes on from step {trainer.step:,}"
    return banner(
        run.recipe,
        architecture=plan.architecture,
        zero=plan.deployment.zero,
        backend=find_backend(run.recipe, run.ranks.device),
        ranks=run.ranks.world_size,
        nodes=plan.deployment.nodes,
        steps=trainer.total_steps,
        probabilities=loader.schedule.probabilities,
        streams=loader.report(),
        plan=plan,
        place=f"{run.folder.path}, {begins}",
    )


def _profiled_steps(profile: ProfileRequest, loader: ElasticLoader, steps: int) -> list[int]:
    """The numbers of the steps to record, of a run of `steps` steps."""
    return profile.numbers(lambda step: loader.schedule(step - 1).name, begins=loader.start_step, total=steps)


def _check_targets(run: Run, loader: ElasticLoader) -> list[str]:
    """The loader's `check_targets` on all ranks, by one reading of the data: rank 0's."""
    found: list[str] | UserError | None = None
    if run.ranks.is_first:
        try:
            found = loader.check_targets()
        except UserError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return found


def _rank_share(run: Run) -> RankShare:
    return RankShare(
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        micro_batch_bins=run.recipe.training.micro_batch_bins,
        pin_memory=run.ranks.device.type == "cuda",
        layout_policy=run.layout_policy,
    )


def _build_trainer(
    run: Run,
    inputs: RunInputs,
    loader: ElasticLoader,
    resumption: Resumption | None,
    evaluator: Evaluator,
    watchdog: Watchdog,
    planned: StartPlan | None,
    memory: PeakMemory,
    steps: int,
) -> Trainer:
    """The trainer with its engine, in the state that is resumed from, for `steps` steps in all."""
    recipe = run.recipe
    check_schedule(recipe.schedule, steps)
    refuse_what_cannot_fit(run, loader)
    with libraries_apart():
        is_universal = resumption is not None and resumption.is_universal
        engine = build_engine(run, inputs, steps, is_universal=is_universal)
    if resumption is not None:
        restore(engine, resumption, recipe)
    if run.ranks.device.type == "cpu":
        host_memory.keep_freed_pages()
    spikes = SpikeDetector(recipe)
    return Trainer(
        run=run,
        engine=engine,
        loader=loader,
        callbacks=callbacks_of_run(run, inputs, engine, spikes, planned),
        checkpointer=_checkpointer(run, inputs, engine, resumption, evaluator),
        evaluator=evaluator,
        spikes=spikes,
        watchdog=watchdog,
        memory=memory,
        total_steps=steps,
        step=resumption.step if resumption else 0,
        targetless=TargetlessSteps.of(resumption.found.content["state"] if resumption else {}),
        own_time=OwnTime(run.ranks.device) if run.ranks.world_size > 1 else None,
    )


def _checkpointer(
    run: Run, inputs: RunInputs, engine: Engine, resumption: Resumption | None, evaluator: Evaluator
) -> Checkpointer:
    keep_best = run.recipe.checkpoint.keep_best
    return Checkpointer(
        run.recipe.checkpoint,
        run.folder,
        run.ranks,
        exclude_frozen=run.recipe.model.lora is not None,
        header={
            **manifest_header(engine, run.recipe, _layout(run), resumption),
            "export": {
                **export_record(engine.module, add_bos=inputs.add_bos),
                "sources": sources_record(run.recipe, inputs.stores),
            },
        },
        best=BestKeeper(
            keep_best,
            run.folder,
            run.ranks,
            saved=resumption.found.content["state"].get("best") if resumption else None,
            measured_on=None if keep_best is None else evaluator.identity_of(keep_best.metric),
        ),
    )


def _evaluator(
    run: Run, inputs: RunInputs, watchdog: Watchdog, before: dict[str, dict[str, Any]]
) -> Evaluator:
    return Evaluator(
        spec=run.recipe.evaluation,
        inputs=inputs,
        ranks=run.ranks,
        folder=run.folder,
        stop=run.stop,
        on_progress=watchdog.note_progress,
        before=before,
        layout_policy=run.layout_policy,
    )


def _take_over(run: Run, resume: str, resumption: Resumption | None, tokenizer: FastTokenizer) -> None:
    """Rank 0, when nothing can refuse this start any more: from here on the folder's files describe it.

    The state is written first: a crash must not leave a run in the state `done` without its checkpoints.
    """
    run.folder.write_state("running", step=resumption.step if resumption else 0)
    run.folder.remove_incomplete()
    set_aside(run.folder, resume, resumption)
    if resumption is not None:
        record.write(run.folder, resumption.found.path, resumption.step)
    run.folder.record(run.recipe)
    with atomic_folder(run.folder.tokenizer, replace=True) as temporary:
        save_tokenizer(tokenizer, temporary)


def _train_and_export(trainer: Trainer, start: RunStart, tokenizer: ExportedTokenizer) -> State:
    """The loop, the export where the run is done, and the last state in the folder."""
    run, callbacks = trainer.run, trainer.callbacks
    callbacks.on_start(start)
    try:
        with trainer.own_time or contextlib.nullcontext():
            state = trainer.train()
    finally:
        trainer.loader.close()
    run.stop.finish()
    if state == "done" and run.recipe.checkpoint.export:
        for line in export_run(trainer, tokenizer):
            callbacks.on_message(line)
    callbacks.on_end(trainer.step, state)
    reasons = distributed.all_gather_objects(run.stop.reason if state == "preempted" else "")
    if run.ranks.is_first:
        best = trainer.checkpointer.best.best
        of_best = f"the best is {best}" if best is not None and state == "done" else ""
        reason = next(filter(None, [*reasons, of_best]), "")
        run.folder.write_state(state, step=trainer.step, reason=reason)
    return state


def _ignore_warnings() -> None:
    """Those that come with every step and mean nothing would fill the logs."""
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed: a warning for each call, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # The schedule counts steps: one without a target comes before the first update, or between two.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
