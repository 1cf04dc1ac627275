"""Real ranks over gloo for the model's tests, and the batches they train on."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.common.process_end import end_process
from bico_ds.runtime.launch_environment import free_port
from tests.distributed.launching import rank_variables

VOCABULARY = 101


def ds_config(world_size: int, stage: int = 3) -> dict[str, Any]:
    """A DeepSpeed configuration for small CPU runs."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        # No parameter is too small to be divided: each module must find its own weights, forward and backward.
        "zero_optimization": {"stage": stage}
        | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},  # unlike Adam, feels the gradient's scale
        "zero_allow_untested_optimizer": True,
    }


def run_on_ranks(worker: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run `worker(rank, world_size, *args)` in fresh processes; raise what any of them raises.

    They are forks of one process that has imported what takes seconds, and has done nothing else.
    """
    multiprocessing.set_forkserver_preload(["deepspeed", "bico_ds.training.start"])
    given = (worker, world_size, free_port(), dict(os.environ), args)
    mp.start_processes(_start, args=given, nprocs=world_size, start_method="forkserver")


def _start(
    rank: int,
    worker: Callable[..., None],
    world_size: int,
    port: int,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment | rank_variables(rank, world_size, port))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    worker(rank, world_size, *args)
    torch.distributed.destroy_process_group()
    end_process(0)


def causal_batch(seed: int, lengths: list[int], loss_rows: int) -> PackedBatch:
    """Random documents of these lengths; the first `loss_rows` rows have random targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    return PackedBatch(
        input_ids=torch.randint(0, VOCABULARY, (tokens,), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        plan=build_plan("causal", kept_lengths=lengths),
        loss_rows=torch.arange(loss_rows),
        targets=torch.randint(0, VOCABULARY, (loss_rows,), generator=generator),
        represented_tokens=tokens,
        documents=torch.zeros(len(lengths), 3, dtype=torch.int64),
    )
