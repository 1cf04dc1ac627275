"""The callbacks of a run, in the order in which they are called."""

from __future__ import annotations

from bico_ds.data.loading.batch_view import shown_text
from bico_ds.model.deepspeed_engine import Engine
from bico_ds.training.assembly import RunInputs
from bico_ds.training.callbacks.base import Callback, Callbacks
from bico_ds.training.callbacks.console import ConsoleProgress
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.planned import PlannedBesideMeasured, planned_memory
from bico_ds.training.callbacks.slowest import SlowestRank
from bico_ds.training.callbacks.stopwatch import Stopwatch
from bico_ds.training.callbacks.tensorboard.pages import BoardPages
from bico_ds.training.callbacks.utilization import Utilization
from bico_ds.training.callbacks.work import ObjectiveWork
from bico_ds.training.planning import StartPlan
from bico_ds.training.run import Run
from bico_ds.training.spikes import SpikeDetector


def callbacks_of_run(
    run: Run, inputs: RunInputs, engine: Engine, spikes: SpikeDetector, planned: StartPlan | None
) -> Callbacks:
    """Those of this rank. `planned`: rank 0's; on the others None, where only those that every rank needs are called."""
    plan = planned.plan if planned is not None else None
    utilization = Utilization.planned(plan) if plan is not None else None
    console = ConsoleProgress(utilization=utilization, quiet=run.output.is_quiet)
    work = ObjectiveWork(plan, run.folder, console)
    slowest = SlowestRank(run.ranks, run.folder, console) if run.ranks.world_size > 1 else None
    watch = Stopwatch()
    monitor = StepMonitor(
        run.recipe.monitor,
        run.folder,
        engine.monitor,
        utilization,
        work,
        slowest,
        tell=console.on_message,
        ranks=run.ranks.world_size,
        planned_memory=planned_memory(plan) if plan is not None else None,
        watch=watch,
    )
    callbacks: list[Callback] = [work, console, monitor, spikes]
    if slowest is not None:
        callbacks.append(slowest)
    tell = Callbacks([console, monitor], is_first_rank=True)
    if run.recipe.monitor.tensorboard:
        pages = BoardPages(run.folder.path, monitor, shown_text(inputs.tokenizer), tell)
        callbacks.insert(0, pages)
        tell = Callbacks([pages, console, monitor], is_first_rank=True)
    if planned is not None:
        callbacks.insert(0, PlannedBesideMeasured(planned.plan, planned.memory, run.folder, tell))
    return Callbacks(callbacks, is_first_rank=run.ranks.is_first, watch=watch)
