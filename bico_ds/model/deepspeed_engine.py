"""DeepSpeed's engine as this package uses it: no other attribute of it is used here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bico_ds.batch import PackedBatch
from bico_ds.model.build import TrainableModel
from bico_ds.model.head import Losses


class ZeroOptimizer(Protocol):
    """DeepSpeed's wrapper of any ZeRO stage around the `optimizer` that updates the fp32 masters."""

    optimizer: Optimizer
    single_partition_of_fp32_groups: list[Tensor]
    """ZeRO-1 and 2: this rank's flat masters, one tensor per parameter group."""

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> Tensor:
        """ZeRO-3: this rank's slice of the master, or of the state `optim_state_key`; KeyError before the first update."""
        ...


class EventWriter(Protocol):
    """DeepSpeed's monitor: CSV, W&B."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


class Engine(Protocol):
    """A `deepspeed.DeepSpeedEngine` around a `TrainableModel`."""

    optimizer: ZeroOptimizer
    lr_scheduler: LambdaLR
    monitor: EventWriter
    checkpoint_engine: Any
    _config: Any
    _copy_recovery_script: Callable[[str], None]

    @property
    def module(self) -> TrainableModel: ...

    def __call__(self, batch: PackedBatch) -> Losses: ...

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Any: ...

    def step(self) -> None: ...

    def was_step_applied(self) -> bool: ...

    def get_lr(self) -> list[float]: ...

    def get_global_grad_norm(self) -> float | Tensor | None: ...

    def zero_optimization_stage(self) -> int: ...

    def empty_partition_cache(self) -> None:
        """ZeRO-3: wait for what is being gathered, and release all that is."""
        ...

    def save_checkpoint(
        self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool
    ) -> Any: ...

    def load_checkpoint(
        self, load_dir: str, *, tag: str, load_module_strict: bool
    ) -> tuple[str | None, Any]: ...
