"""What the planner knows of GPUs: memory, peaks and links by data sheet, each with its source; a user's own from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.paths import LocalPath

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on. Rates are per second and device, of links per direction.

    `memory_bytes`: what programs can allocate. `bf16_flops` and `fp32_flops`: dense matrix products. `link_bandwidth`: to
    the other devices of its node; `network_bandwidth`: to other nodes; `host_bandwidth`: to the host's memory.
    """

    name: str
    title: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    per_node: int
    source: str
    kind: Literal["cuda", "cpu"] = "cuda"

    def peak_flops(self, dtype: str) -> float:
        """Of dense matrix products in `dtype`, "bf16" or "fp32"."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


_DEVICES: dict[str, Device] = {
    "h100-80g": Device(
        name="h100-80g",
        title="NVIDIA H100 SXM, 80 GB",
        memory_bytes=int(79.1 * GIB),
        bf16_flops=989.4e12,
        fp32_flops=66.9e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=55e9,
        per_node=8,
        source="NVIDIA H100 data sheet",
    ),
}
DEVICES: Mapping[str, Device] = MappingProxyType(_DEVICES)


def find_device(written: LocalPath | str) -> Device:
    """STUB"""
    name = str(written)
    if name not in DEVICES:
        raise UserError(f"'{name}' is no GPU{did_you_mean(name, DEVICES)}; known: {', '.join(DEVICES)}")
    return DEVICES[name]
