"""A run that cannot fit into the memory that is there is refused before its weights are read."""

from __future__ import annotations

import socket
from functools import partial

import torch

from bico_ds.cluster.preflight.fit import NodeMemory, lack_of_memory
from bico_ds.common.errors import UserError
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.model.architecture import with_own_config
from bico_ds.runtime import distributed, host_memory, launch_environment
from bico_ds.training.planning import plan_of_run
from bico_ds.training.run import Run


def refuse_what_cannot_fit(run: Run, loader: ElasticLoader) -> None:
    """Raise `UserError`, on all ranks, where not even the least that the run's plan needs is there. Collective.

    The first rank of each machine judges its own, so that a start sends one number, however many ranks there are.
    """
    lack = _lack_here(run, loader) if run.ranks.local_rank == 0 else None
    (lacking,) = distributed.all_reduce_sum([float(lack is not None)], run.ranks.device)
    if lacking:
        raise UserError(next(filter(None, distributed.all_gather_objects(lack))))


def _lack_here(run: Run, loader: ElasticLoader) -> str | None:
    """Of this machine; where no launcher tells how many ranks it has, it counts as having one."""
    device, world_size = run.ranks.device, run.ranks.world_size
    here = NodeMemory(
        host=socket.gethostname(),
        ranks=min(launch_environment.ranks_per_node() or 1, world_size),
        device_bytes=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None,
        host_bytes=host_memory.memory_with_swap(),
    )
    recipe = run.recipe.model_copy(update={"model": with_own_config(run.recipe.model)})
    fill = min(stream.fill for stream in loader.report())
    return lack_of_memory(partial(plan_of_run, recipe, loader), [here], fill=fill, world_size=world_size)
