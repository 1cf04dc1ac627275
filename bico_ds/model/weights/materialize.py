"""From shapes on the meta device to weights: all on one device, or this rank's partition under ZeRO-3.

DeepSpeed's usual way (`deepspeed.zero.Init` as a context) builds each full parameter on every rank and broadcasts it from
rank 0. Here a rank asks a `WeightSource` for its own slice only, and nothing is sent. ZeRO++'s hpZ is the exception: it
cuts two partitions out of a parameter, and a rank asks for the full one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from packaging.version import Version
from torch import Tensor, nn

from bico_ds.common.errors import UserError

if TYPE_CHECKING:
    import deepspeed

    class Partition(Tensor):
        """This rank's slice of a flattened parameter, padded at the parameter's end."""

        ds_numel: int

    class PartitionedParameter(nn.Parameter):
        """What DeepSpeed makes of a parameter under ZeRO-3: no class of its own, attributes on the parameter."""

        ds_numel: int
        ds_shape: torch.Size
        ds_tensor: Partition
        ds_zero_partition_rank: int

        def partition(self) -> None: ...


_CUTS_EMPTY_SHARES = Version("0.19.5")


class WeightSource(Protocol):
    """Where weights come from; the same on every rank."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU."""
        ...


def materialize(
    model: nn.Module, source: WeightSource, *, ds_config: dict[str, Any] | None, device: torch.device
) -> None:
    """Replace every meta parameter of `model` by a real one filled from `source`; tied ones stay tied.

    Under ZeRO-3 (`ds_config`) each rank reads and keeps its partition; the full shape is allocated, one
    parameter at a time, but on a CPU only the pages of the own slice are ever written (with hpZ all, and all is read).

    Raises `UserError` as `check_second_partitions` does, before anything is read.
    """
    partitioner = _partitioner(ds_config, next(model.parameters()).dtype)
    if partitioner is not None and partitioner.zero_param_process_group is not None:
        group = partitioner.num_ranks_in_param_group
        check_second_partitions(model, ranks=partitioner.dp_world_size, group=group)
    made: dict[int, nn.Parameter] = {}
    for name, module, attribute, stub in _owned_parameters(model):
        if id(stub) not in made:
            empty = torch.empty if partitioner is None or device.type != "cpu" else _mapped
            parameter = nn.Parameter(
                empty(stub.shape, dtype=stub.dtype, device=device), requires_grad=stub.requires_grad
            )
            if partitioner is None:
                _fill(parameter, name, source, 0, parameter.numel())
            else:
                _fill_partition(parameter, name, source, partitioner)
            made[id(stub)] = parameter
        setattr(module, attribute, made[id(stub)])


def check_second_partitions(model: nn.Module, *, ranks: int, group: int) -> None:
    """Refuse hpZ over `group` of all `ranks` for a weight that the installed DeepSpeed would end at in an IndexError.

    Before 0.19.5 that is one so small that its padded share lies past its end on some rank (DeepSpeed#8210). Raises
    `UserError`.
    """
    if Version(version("deepspeed")) >= _CUTS_EMPTY_SHARES:
        return
    for name, parameter in model.named_parameters():
        share = -(-parameter.numel() // ranks) * ranks // group
        if share * (group - 1) > parameter.numel():
            raise UserError(
                f"deepspeed: zero_hpz_partition_size: DeepSpeed {version('deepspeed')} cannot divide {name} with its "
                f"{parameter.numel()} elements over {ranks} ranks and again over {group} (DeepSpeed#8210); "
                f"install deepspeed>={_CUTS_EMPTY_SHARES}, or set deepspeed.config=zero3_bf16"
            )


def is_partitioned(parameter: Tensor) -> TypeGuard[PartitionedParameter]:
    """Whether ZeRO-3 has partitioned `parameter`."""
    return hasattr(parameter, "ds_id")


def partition_bounds(parameter: PartitionedParameter) -> tuple[int, int]:
    """Elements [start, stop) of the flattened parameter that are in this rank's ZeRO-3 partition."""
    start = parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_rank
    return min(start, parameter.ds_numel), min(start + parameter.ds_tensor.ds_numel, parameter.ds_numel)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def full_numel(parameter: Tensor) -> int:
    """The number of elements of a parameter, partitioned or not."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


def gathered(parameters: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Gather ZeRO-3 parameters on every rank for the block; others are left as they are. Collective."""
    if not any(map(is_partitioned, parameters)):
        return nullcontext()
    import deepspeed  # seconds, and only ZeRO-3 needs it

    return deepspeed.zero.GatheredParameters(list(parameters))


def uses_zero3(ds_config: dict[str, Any] | None) -> bool:
    """Whether a DeepSpeed configuration partitions the parameters."""
    return ds_config is not None and ds_config.get("zero_optimization", {}).get("stage", 0) == 3


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, owner, attribute, parameter), a tied parameter once for each of its owners."""
    for prefix, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute, parameter


def _partitioner(ds_config: dict[str, Any] | None, dtype: torch.dtype) -> deepspeed.zero.Init | None:
    if not uses_zero3(ds_config):
        return None
    import deepspeed  # seconds, and only ZeRO-3 needs it

    return deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=dtype)


def _mapped(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized CPU tensor in pages of its own, which go back to the system with it.

    On the heap it would leave holes, half of them resident, between the partitions that stay: 0.5 GB were measured, beside
    the 1.1 GB of one rank's partitions.
    """
    pages = mmap.mmap(-1, max(shape.numel() * dtype.itemsize, 1))
    return torch.frombuffer(pages, dtype=dtype, count=shape.numel()).view(shape).to(device)


def _fill_partition(
    parameter: nn.Parameter, name: str, source: WeightSource, partitioner: deepspeed.zero.Init
) -> None:
    numel, world_size = parameter.numel(), partitioner.dp_world_size
    if partitioner.zero_param_process_group is not None:
        _fill(parameter, name, source, 0, numel)  # ZeRO++ (hpZ) cuts a second, larger partition for the node
    else:
        size = -(-numel // world_size)
        start = min(size * partitioner.rank, numel)
        _fill(parameter, name, source, start, min(start + size, numel))
    partitioner._convert_to_deepspeed_param(parameter)
    assert is_partitioned(parameter)
    parameter.partition()


@torch.no_grad()
def _fill(parameter: nn.Parameter, name: str, source: WeightSource, start: int, stop: int) -> None:
    if start < stop:
        parameter.view(-1)[start:stop].copy_(source.read(name, parameter.shape, start, stop))
