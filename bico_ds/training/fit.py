"""A run that cannot fit into the memory that is there is refused before its weights are read."""

from __future__ import annotations

import socket
from functools import partial

import torch

from bico_ds.cluster.preflight.fit import by_node, lack_of_memory
from bico_ds.common.errors import UserError
from bico_ds.data.loading.loader import ElasticLoader
from bico_ds.model.architecture import with_own_config
from bico_ds.runtime import distributed, host_memory
from bico_ds.training.planning import plan_of_run
from bico_ds.training.run import Run


def refuse_what_cannot_fit(run: Run, loader: ElasticLoader) -> None:
    """Raise `UserError`, on all ranks, where not even the least that the run's plan needs is there. Collective."""
    device = run.ranks.device
    device_bytes = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    own = (socket.gethostname(), host_memory.machine(), device_bytes, host_memory.memory_with_swap())
    nodes = by_node(distributed.all_gather_objects(own))
    lack = None
    if run.ranks.is_first:
        recipe = run.recipe.model_copy(update={"model": with_own_config(run.recipe.model)})
        fill = min(stream.fill for stream in loader.report())
        lack = lack_of_memory(partial(plan_of_run, recipe, loader), nodes, fill=fill)
    lack = distributed.broadcast_object(lack)
    if lack is not None:
        raise UserError(lack)
