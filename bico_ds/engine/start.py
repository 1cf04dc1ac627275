"""From a recipe to a finished run: each phase in its order, every mistake before the expensive part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from bico_ds.config.errors import UserError
from bico_ds.config.schema import Recipe
from bico_ds.data.loader import ElasticLoader
from bico_ds.data.tokenizer import vocabulary_size
from bico_ds.engine import checkpoint, distributed, materials
from bico_ds.engine.callbacks.base import Callback, Callbacks, RunStart
from bico_ds.engine.callbacks.console import ConsoleProgress
from bico_ds.engine.callbacks.evaluation import Evaluator
from bico_ds.engine.callbacks.monitor import StepMonitor
from bico_ds.engine.checkpoint import Checkpointer, FoundCheckpoint
from bico_ds.engine.distributed import Ranks
from bico_ds.engine.materials import Materials
from bico_ds.engine.ds_config import build_ds_config, gradient_accumulation
from bico_ds.engine.optimization import build_scheduler, check_schedule
from bico_ds.engine.run_folder import RunFolder, State
from bico_ds.engine.signals import StopFlag
from bico_ds.engine.trainer import Trainer
from bico_ds.model.architecture import check_vocabulary, model_config
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.model.export import export_model


@dataclass(frozen=True)
class Resume:
    """What rank 0 decided for all: the checkpoint to go on from, and the run id that may write."""

    found: FoundCheckpoint | None
    run_id: str


def train(recipe: Recipe, *, output_dir: str | None, resume: str, stop: StopFlag) -> State:
    """Train a recipe to its end, or to the agreed stop. Called on every rank; returns the same state on each."""
    _quiet()
    ranks = distributed.read_ranks()
    folder = RunFolder(output_dir or recipe.output_dir or f"runs/{recipe.name}")
    check(recipe, ranks.world_size)
    decision = _first_rank_prepares(recipe, folder, resume) if ranks.is_first else None
    distributed.join(ranks, timeout_minutes=recipe.distributed.timeout_minutes)
    decision = distributed.broadcast_object(decision)
    folder.run_id = decision.run_id
    try:
        state = _run(recipe, folder, decision.found, ranks, stop)
    except BaseException as error:
        if ranks.is_first:
            folder.write_state("failed", step=None, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if ranks.is_first:
            folder.close()
    distributed.leave()
    return state


def check(recipe: Recipe, world_size: int) -> None:
    """Everything that can be refused without data, weights or other ranks."""
    expected = recipe.distributed.world_size
    if expected is not None and expected != world_size:
        raise UserError(
            f"distributed.world_size: this recipe is made for {expected} ranks, started with {world_size}; "
            "start it with as many, or set distributed.world_size=null"
        )
    gradient_accumulation(recipe, world_size)
    if recipe.training.steps is not None:
        check_schedule(recipe.schedule, recipe.training.steps)
    model_config(recipe.model)


def _first_rank_prepares(recipe: Recipe, folder: RunFolder, resume: str) -> Resume:
    """Rank 0, before the others are let in: the lock, the data, and the checkpoint to resume from."""
    folder.open(recipe)
    materials.prepare(recipe)
    found = _find_checkpoint(folder, resume)
    return Resume(found, folder.run_id)


def _find_checkpoint(folder: RunFolder, resume: str) -> FoundCheckpoint | None:
    if resume == "none":
        folder.set_aside()
        return None
    found = checkpoint.find(folder.checkpoints) if resume == "auto" else checkpoint.verify(Path(resume))
    if found is not None:
        print(f"resuming from {found.path} (step {found.step}, written by {found.world_size} ranks)", flush=True)
    return found


def _run(recipe: Recipe, folder: RunFolder, found: FoundCheckpoint | None, ranks: Ranks, stop: StopFlag) -> State:
    goods = materials.gather(recipe)
    loader = materials.build_loader(
        recipe,
        goods,
        rank=ranks.rank,
        world_size=ranks.world_size,
        state=found.manifest["state"]["loader"] if found else None,
        pin_memory=ranks.device.type == "cuda",
    )
    steps = materials.total_steps(recipe, loader)
    check_schedule(recipe.schedule, steps)
    engine = build_engine(recipe, ranks, folder, goods, steps)
    if found is not None:
        checkpoint.load(engine, found)
    callbacks = Callbacks(_callbacks(recipe, folder, engine) if ranks.is_first else [])
    trainer = Trainer(
        engine=engine,
        loader=loader,
        objective_of=goods.schedule,
        callbacks=callbacks,
        checkpointer=Checkpointer(recipe.checkpoint, folder, ranks, exclude_frozen=recipe.model.lora is not None),
        evaluator=Evaluator(recipe.evaluation, goods.tasks, goods.tokenizer, ranks, folder, stop),
        ranks=ranks,
        folder=folder,
        stop=stop,
        seed=recipe.seed,
        step_capacity=recipe.training.global_batch_bins * recipe.data.capacity,
        total_steps=steps,
        on_nonfinite=recipe.training.on_nonfinite,
        step=found.step if found else 0,
    )
    first = RunStart(recipe=recipe, first_step=trainer.step, total_steps=steps, summary=_summary(loader))
    return _finish(trainer, first, callbacks, recipe, goods.tokenizer, loader.close)


def _finish(
    trainer: Trainer,
    first: RunStart,
    callbacks: Callbacks,
    recipe: Recipe,
    tokenizer: Any,
    close_loader: Callable[[], None],
) -> State:
    ranks, folder = trainer.ranks, trainer.folder
    callbacks.on_start(first)
    if ranks.is_first:
        folder.write_state("running", step=trainer.step)
    try:
        state = trainer.run()
    finally:
        close_loader()
    if state == "done":
        trainer.stop.finish()
        if recipe.checkpoint.export:
            export_model(
                trainer.engine.module, tokenizer, folder.export, dtype=recipe.model.dtype, overwrite=True
            )
    callbacks.on_end(trainer.step, state)
    if ranks.is_first:
        folder.write_state(state, step=trainer.step, reason=trainer.stop.reason if state == "preempted" else "")
    dist.barrier()
    return state


def build_engine(recipe: Recipe, ranks: Ranks, folder: RunFolder, goods: Materials, steps: int) -> Any:
    """The DeepSpeed engine around the trainable model."""
    check_vocabulary(
        model_config(recipe.model), vocabulary_size(goods.tokenizer), tokenizer=goods.tokenizer_path
    )
    ds_config = build_ds_config(
        recipe,
        world_size=ranks.world_size,
        hidden_size=model_config(recipe.model).hidden_size,
        on_cuda=ranks.device.type == "cuda",
        run_folder=folder.path,
    )
    model: TrainableModel = build_model(
        recipe.model, seed=recipe.seed, ds_config=ds_config, device=ranks.device, longest_document=recipe.data.capacity
    )
    if recipe.model.path is None:
        _adopt_special_tokens(model.causal_lm, goods.tokenizer)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: build_scheduler(recipe.schedule, optimizer, steps),
        dist_init_required=False,
    )
    return engine


def _adopt_special_tokens(causal_lm: Any, tokenizer: Any) -> None:
    """A model from random weights ends its texts as its tokenizer does."""
    for config in (causal_lm.config, causal_lm.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def _callbacks(recipe: Recipe, folder: RunFolder, engine: Any) -> list[Callback]:
    return [ConsoleProgress(), StepMonitor(recipe.monitor, folder, engine.monitor)]


def _summary(loader: ElasticLoader) -> dict[str, Any]:
    return {"data": [asdict(stream) for stream in loader.report()]}


def _quiet() -> None:
    """Keep the console for what the user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames; one warning a call, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
