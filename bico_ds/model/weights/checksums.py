"""Order-sensitive 64-bit checksums of weights that add up over slices: no rank needs a complete tensor.

The checksum of a flat tensor is `Σ (2i + 1) · bits(x_i) mod 2^64`, i its global index: the sum over the ranks' partitions
is the checksum of the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bico_ds.model.weights.materialize import gathered, is_partitioned, partition_bounds

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements: their 64-bit copies stay in a CPU's cache, and take 2 MiB each.
_CHUNK = 1 << 18


@torch.no_grad()
def slice_checksum(flat: Tensor, start: int) -> int:
    """Checksum of elements `start …` of a tensor, given as a 1-D slice of it; signed 64 bits, wrapping."""
    bits = flat.detach().contiguous().view(_INTEGER_OF_SIZE[flat.dtype.itemsize])
    odd = 2 * torch.arange(min(_CHUNK, bits.numel()), device=flat.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for offset in range(0, bits.numel(), _CHUNK):
        chunk = bits[offset : offset + _CHUNK].long()
        total += (chunk * odd[: chunk.numel()]).sum() + 2 * (start + offset) * chunk.sum()
    return int(total)


def parameter_checksums(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Checksum of each parameter, by name.

    Where ZeRO-3 has partitioned them, over all ranks, and collective; else of this rank's own copy.
    """
    parameters = dict(named)
    sums = torch.tensor([_own_checksum(parameter) for parameter in parameters.values()], dtype=torch.int64)
    partitioned = [is_partitioned(parameter) for parameter in parameters.values()]
    if any(partitioned):
        assert all(partitioned), "DeepSpeed partitions all parameters or none"
        sums = add_over_ranks(sums)
    return dict(zip(parameters, sums.tolist(), strict=True))


def add_over_ranks(sums: Tensor) -> Tensor:
    """Sum of int64 vectors over all ranks, wrapping. Collective, where there is a process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    on_device = sums.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def base_fingerprint(causal_lm: nn.Module) -> str:
    """SHA-256 over name and checksum of every frozen parameter; on a resume a LoRA checkpoint must find the same.

    Collective under ZeRO-3; equal on every rank and for every world size.
    """
    frozen = [
        (name, parameter) for name, parameter in causal_lm.named_parameters() if not parameter.requires_grad
    ]
    return fingerprint_of(parameter_checksums(frozen))


def fingerprint_of(checksums: dict[str, int]) -> str:
    """SHA-256 over names and checksums, in whatever order they come."""
    lines = [f"{name} {checksum}" for name, checksum in sorted(checksums.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own_checksum(parameter: nn.Parameter) -> int:
    """The checksum of this rank's partition, or of the parameter where it is not partitioned."""
    if not is_partitioned(parameter):
        return slice_checksum(parameter.data.view(-1), 0)
    start, stop = partition_bounds(parameter)
    if parameter.ds_tensor.numel() < stop - start:  # offloaded to NVMe
        with gathered((parameter,)):
            return slice_checksum(parameter.data.view(-1)[start:stop], start)
    return slice_checksum(parameter.ds_tensor[: stop - start], start)
