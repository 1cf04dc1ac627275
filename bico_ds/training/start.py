"""From a recipe to a finished run: each phase in its order, every mistake before the expensive part."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.checkpoint.resume import (
    Resumption,
    StateLayout,
    choose,
    manifest_header,
    restore,
    set_aside,
    state_layout,
)
from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.loader import RankShare
from bico_ds.data.tokenizer import Tokenizer, vocabulary_size
from bico_ds.model.architecture import adopt_special_tokens, check_vocabulary, model_config
from bico_ds.model.build import TrainableModel, build_model, check_rotary
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.model.weights.export import export_model
from bico_ds.optim.schedule import build_scheduler, check_schedule
from bico_ds.runtime import distributed, host_memory, launch_environment, native_ops
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.ds_config import build_ds_config
from bico_ds.runtime.lock import FencedError
from bico_ds.runtime.run_folder import RunFolder, State, folder_of_run
from bico_ds.runtime.signals import Interrupted, StopFlag
from bico_ds.runtime.watchdog import Watchdog
from bico_ds.training import assembly
from bico_ds.training.assembly import RunInputs
from bico_ds.training.callbacks.base import Callbacks, RunStart
from bico_ds.training.callbacks.console import ConsoleProgress
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.evaluator import Evaluator
from bico_ds.training.run import Run
from bico_ds.training.trainer import Trainer

RANKS_PER_NODE = 8  # where no launcher says


def train(recipe: Recipe, *, output_dir: Path | None, resume: str, stop: StopFlag) -> State:
    """Train a recipe to its end, or to the agreed stop. Called on every rank; returns the same state on each: `done`, or
    `preempted`.

    Raises `UserError`, `RunError`, or what else failed; the ranks on which nothing failed end a moment later.
    """
    _quiet()
    ranks = distributed.read_ranks()
    if ranks.device.type == "cpu":
        host_memory.bound_primitive_cache()
    folder = RunFolder(folder_of_run(recipe, output_dir))
    ds_config = check(
        recipe, world_size=ranks.world_size, on_cuda=ranks.device.type == "cuda", run_folder=folder.path
    )
    _log_to_console(ranks)
    policy = check_backend(recipe, ranks.device)
    run = Run(recipe=recipe, ranks=ranks, folder=folder, stop=stop, ds_config=ds_config, layout_policy=policy)
    store = distributed.connect(ranks, timeout_minutes=recipe.distributed.timeout_minutes)
    chosen: list[Resumption | None] = []
    try:
        distributed.first_alone(ranks, store, lambda: chosen.append(_prepare(run, resume)))
    except Interrupted:
        return "preempted"
    native_ops.prefer_own_ninja()
    if ranks.local_rank == 0:
        native_ops.release_abandoned_locks()
    distributed.join(ranks, store, timeout_minutes=recipe.distributed.timeout_minutes)
    watchdog = Watchdog(store, ranks, folder, minutes=recipe.distributed.watchdog_minutes)
    folder.lock.on_lost = lambda: watchdog.abandon(f"{folder.path} was taken over by another run")
    try:
        resumption, folder.lock.run_id = distributed.broadcast_object(
            (chosen[0], folder.lock.run_id) if chosen else None
        )
        state = _run(run, resume, resumption, watchdog)
    except BaseException as error:
        watchdog.report(error)
        if ranks.is_first:
            _give_up(folder, error)
        raise
    watchdog.close()
    dist.barrier()
    if ranks.is_first:
        folder.close()
    distributed.leave()
    return state


def check(
    recipe: Recipe,
    *,
    world_size: int,
    on_cuda: bool,
    run_folder: Path,
    ranks_per_node: int | None = None,
    runs_here: bool = True,
) -> dict[str, Any]:
    """Refuse what can be refused without data, weights (but their config.json) or other ranks; return DeepSpeed's
    configuration. Raises `UserError`.

    Without `runs_here` (another machine will train) DeepSpeed's own paths stay as they were written.
    """
    expected = recipe.distributed.world_size
    if expected is not None and expected != world_size:
        raise UserError(
            f"distributed.world_size: this recipe is made for {expected} ranks, started with {world_size}; "
            "start it with as many, or set distributed.world_size=null"
        )
    if recipe.training.steps is not None:
        check_schedule(recipe.schedule, recipe.training.steps)
    config = model_config(recipe.model)
    return build_ds_config(
        recipe,
        world_size=world_size,
        hidden_size=config.hidden_size,
        on_cuda=on_cuda,
        run_folder=run_folder,
        ranks_per_node=ranks_per_node or launch_environment.ranks_per_node() or RANKS_PER_NODE,
        runs_here=runs_here,
    )


def check_backend(recipe: Recipe, device: torch.device) -> LayoutPolicy | None:
    """The layout policy of the attention backend that will run (the oracle has none); logs once what `auto` takes.

    Raises `UserError` where the backend that the recipe names cannot run here.
    """
    config = model_config(recipe.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        backend = resolve(recipe.model.attention_backend, config.dtype, head_dim, device)
    except ValueError as error:
        raise UserError(f"model.attention_backend: {error}") from None
    return None if backend is None else backend.policy


def _prepare(run: Run, resume: str) -> Resumption | None:
    """Rank 0, before the others are let in: the lock, the data, and the checkpoint to resume from."""
    run.folder.open()
    try:
        with run.stop.interrupting():
            assembly.prepare(run.recipe)
            return choose(run.folder, resume, run.recipe, _layout(run))
    except Interrupted as stopped:
        run.folder.preempt(f"{stopped} in start-up")
        run.folder.close()
        raise
    except BaseException as error:
        _give_up(run.folder, error)
        raise


def _layout(run: Run) -> StateLayout:
    return state_layout(run.recipe, run.ds_config, run.ranks.world_size)


def _give_up(folder: RunFolder, error: BaseException) -> None:
    with contextlib.suppress(OSError, FencedError):
        folder.fail(f"{type(error).__name__}: {error}")
    folder.close()


def _run(run: Run, resume: str, resumption: Resumption | None, watchdog: Watchdog) -> State:
    recipe, ranks = run.recipe, run.ranks
    inputs = assembly.gather(recipe)
    saved = resumption.found.content["state"] if resumption else {}
    share = RankShare(
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_bins=recipe.training.micro_batch_bins,
        pin_memory=ranks.device.type == "cuda",
        layout_policy=run.layout_policy,
    )
    loader = assembly.build_loader(recipe, inputs, share, state=saved.get("loader"))
    steps = assembly.total_steps(recipe, loader)
    check_schedule(recipe.schedule, steps)
    engine = build_engine(run, inputs, steps, is_universal=resumption is not None and resumption.is_universal)
    if resumption is not None:
        restore(engine, resumption, recipe)
    if ranks.device.type == "cpu":
        host_memory.keep_freed_pages()
    trainer = Trainer(
        run=run,
        engine=engine,
        loader=loader,
        callbacks=_callbacks(run, engine),
        checkpointer=_checkpointer(run, engine),
        evaluator=_evaluator(run, inputs, watchdog),
        watchdog=watchdog,
        total_steps=steps,
        step=resumption.step if resumption else 0,
    )
    for change in loader.changes:
        trainer.callbacks.on_message(f"resumed although it changed: {change}")
    first = RunStart(
        recipe=recipe,
        first_step=trainer.step,
        total_steps=steps,
        summary={"data": [asdict(stream) for stream in loader.report()]},
        saved=saved.get("callbacks", {}),
    )
    if ranks.is_first:
        _take_over(run, resume, resumption, inputs.tokenizer)
    return _finish(trainer, first, inputs.tokenizer)


def _take_over(run: Run, resume: str, resumption: Resumption | None, tokenizer: Tokenizer) -> None:
    """Rank 0, when nothing can refuse this start any more: from here on the folder tells of it.

    The state comes first: a crash in what follows must not leave a run that says `done`, and whose checkpoints are away.
    """
    run.folder.write_state("running", step=resumption.step if resumption else 0)
    set_aside(run.folder, resume, resumption)
    run.folder.record(run.recipe)
    with atomic_folder(run.folder.tokenizer, replace=True) as temporary:
        tokenizer.save_pretrained(temporary)


def _callbacks(run: Run, engine: Engine) -> Callbacks:
    monitor = StepMonitor(run.recipe.monitor, run.folder, engine.monitor)
    return Callbacks([ConsoleProgress(), monitor], is_first_rank=run.ranks.is_first)


def _checkpointer(run: Run, engine: Engine) -> Checkpointer:
    return Checkpointer(
        run.recipe.checkpoint,
        run.folder,
        run.ranks,
        exclude_frozen=run.recipe.model.lora is not None,
        header=manifest_header(engine, run.recipe, _layout(run)),
    )


def _evaluator(run: Run, inputs: RunInputs, watchdog: Watchdog) -> Evaluator:
    return Evaluator(
        spec=run.recipe.evaluation,
        inputs=inputs,
        ranks=run.ranks,
        folder=run.folder,
        stop=run.stop,
        on_progress=watchdog.note_progress,
    )


def _finish(trainer: Trainer, first: RunStart, tokenizer: Tokenizer) -> State:
    run, callbacks = trainer.run, trainer.callbacks
    folder, checkpoint = run.folder, run.recipe.checkpoint
    callbacks.on_start(first)
    try:
        state = trainer.train()
    finally:
        trainer.loader.close()
    run.stop.finish()
    if state == "done" and checkpoint.export:
        model = trainer.engine.module
        export_model(model, tokenizer, folder.export, dtype=run.recipe.model.dtype, overwrite=True)
    callbacks.on_end(trainer.step, state)
    reasons = distributed.all_gather_objects(run.stop.reason if state == "preempted" else "")
    if run.ranks.is_first:
        folder.write_state(state, step=trainer.step, reason=next(filter(None, reasons), ""))
    return state


def build_engine(run: Run, inputs: RunInputs, steps: int, *, is_universal: bool) -> Engine:
    """The DeepSpeed engine around the trainable model; `is_universal`: it will load a universal checkpoint."""
    recipe = run.recipe
    check_vocabulary(
        model_config(recipe.model), vocabulary_size(inputs.tokenizer), tokenizer=str(inputs.tokenizer_path)
    )
    ds_config = dict(run.ds_config)
    if is_universal:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    model: TrainableModel = build_model(
        recipe.model,
        seed=recipe.seed,
        ds_config=ds_config,
        device=run.ranks.device,
        longest_document=recipe.data.capacity,
    )
    if recipe.model.path is None:
        adopt_special_tokens(inputs.tokenizer, model.causal_lm.config, model.causal_lm.generation_config)
    return wrap_model(model, recipe, ds_config, steps)


def wrap_model(model: TrainableModel, recipe: Recipe, ds_config: dict[str, Any], steps: int) -> Engine:
    """DeepSpeed's engine around a model, with the recipe's optimizer and its schedule over so many steps. Collective.

    Raises `UserError` where this DeepSpeed has rounded the rotary frequencies.
    """
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: build_scheduler(recipe.schedule, optimizer, steps),
        dist_init_required=False,
    )
    check_rotary(model)
    return engine


def _log_to_console(ranks: Ranks) -> None:
    """What our own parts log (which attention backend, and why) belongs on rank 0's console."""
    logger = logging.getLogger("bico_ds")
    logger.setLevel(logging.INFO if ranks.is_first else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _quiet() -> None:
    """Keep the console for what the user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames; one warning per call, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
