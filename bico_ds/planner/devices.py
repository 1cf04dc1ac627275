"""What the planner knows of GPUs: memory, peaks and links by data sheet, each with its source; a user's own from YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.yaml_files import MappingFile, read_mapping
from bico_ds.config.bounds import Bound
from bico_ds.config.paths import LocalPath

GIB = 2**30

_Flops = Annotated[float, Bound(least=1e6, most=1e18, why="it is operations per second of one device")]
_Bandwidth = Annotated[float, Bound(least=1e6, most=1e15, why="it is bytes per second of one device")]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on. Rates are per second and device, of links per direction.

    `memory_bytes`: what programs can allocate. `bf16_flops` and `fp32_flops`: dense matrix products. `link_bandwidth`: to
    the other devices of its node; `network_bandwidth`: to other nodes; `host_bandwidth`: to the host's memory.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    title: str
    memory_bytes: Annotated[int, Bound(least=2**20, most=2**50, why="it is bytes of one device")]
    bf16_flops: _Flops
    fp32_flops: _Flops
    memory_bandwidth: _Bandwidth
    link_bandwidth: _Bandwidth
    network_bandwidth: _Bandwidth
    host_bandwidth: _Bandwidth
    per_node: Annotated[int, Bound(least=1, most=10_000, why="it counts the devices of a node")]
    source: str
    kind: Literal["cuda", "cpu"] = "cuda"

    def peak_flops(self, dtype: str) -> float:
        """Of dense matrix products in `dtype`, "bf16" or "fp32"."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


_FIELDS = tuple(field.name for field in fields(Device))
_SOURCE = (
    "the vendor's data sheet or white paper; memory as torch reports it (the least seen in public logs); "
    "network: {:g} Gb/s per GPU, {}"
)
_DGX, _ASSUMED = "as in the vendor's reference node", "an assumption"
_PCIE4, _PCIE5 = 31.5, 63.0  # GB/s of 16 lanes in one direction, after their 128b/130b code

# Data sheets print bf16 with sparsity, twice what dense products have; fp32 is that of products without TF32. Bandwidths of
# NVLink and PCIe are printed for both directions together, and halved here. A GB200's node is a tray of four GPUs; that
# NVLink also joins the trays of a rack is not counted: a user's file can give it as the network.
# fmt: off
_TABLE = (
    # name, title, GiB, TFLOP/s bf16, fp32, memory TB/s, GB/s: link, host; network Gb/s, per node, network's source
    ("a100-40g", "NVIDIA A100 SXM, 40 GB", 39.2, 312, 19.5, 1.555, 300, _PCIE4, 200, 8, _DGX),
    ("a100-80g", "NVIDIA A100 SXM, 80 GB", 79.1, 312, 19.5, 2.039, 300, _PCIE4, 200, 8, _DGX),
    ("h100-80g", "NVIDIA H100 SXM, 80 GB", 79.1, 989.4, 66.9, 3.35, 450, _PCIE5, 400, 8, _DGX),
    ("h100-pcie", "NVIDIA H100 PCIe, 80 GB", 79.1, 756, 51, 2.0, _PCIE5, _PCIE5, 200, 8, _ASSUMED),
    ("h100-nvl", "NVIDIA H100 NVL, 94 GB", 93.0, 835, 60, 3.9, _PCIE5, _PCIE5, 200, 8, _ASSUMED),
    ("h200", "NVIDIA H200 SXM, 141 GB", 139.7, 989.4, 66.9, 4.8, 450, _PCIE5, 400, 8, _DGX),
    ("h200-nvl", "NVIDIA H200 NVL, 141 GB", 139.7, 835, 60, 4.8, _PCIE5, _PCIE5, 200, 8, _ASSUMED),
    ("gh200", "NVIDIA GH200, 96 GB", 94.5, 989.4, 66.9, 4.0, 450, 450, 400, 1, _ASSUMED),
    ("b200", "NVIDIA B200, 180 GB", 178.3, 2250, 75, 7.7, 900, _PCIE5, 400, 8, _DGX),
    ("gb200", "NVIDIA GB200, 186 GB", 184.3, 2500, 80, 8.0, 900, 225, 400, 4, _DGX),
    ("l40s", "NVIDIA L40S, 48 GB", 44.3, 362, 91.6, 0.864, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("l40", "NVIDIA L40, 48 GB", 44.3, 181, 90.5, 0.864, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("l4", "NVIDIA L4, 24 GB", 22.0, 121, 30.3, 0.3, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("a40", "NVIDIA A40, 48 GB", 44.3, 149.7, 37.4, 0.696, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("rtx-4090", "NVIDIA GeForce RTX 4090, 24 GB", 23.5, 165, 82.6, 1.008, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("rtx-3090", "NVIDIA GeForce RTX 3090, 24 GB", 23.5, 71, 35.6, 0.936, _PCIE4, _PCIE4, 100, 8, _ASSUMED),
    ("mi300x", "AMD Instinct MI300X, 192 GB", 191.6, 1307.4, 163.4, 5.3, 448, _PCIE5, 400, 8, _DGX),
)
# fmt: on
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        name: Device(
            name=name,
            title=title,
            memory_bytes=int(gib * GIB),
            bf16_flops=bf16 * 1e12,
            fp32_flops=fp32 * 1e12,
            memory_bandwidth=memory * 1e12,
            link_bandwidth=link * 1e9,
            network_bandwidth=network * 1e9 / 8,
            host_bandwidth=host * 1e9,
            per_node=per_node,
            source=_SOURCE.format(network, network_source),
        )
        for name, title, gib, bf16, fp32, memory, link, host, network, per_node, network_source in _TABLE
    }
)

# Words of torch's name for a GPU, and ours; the first entry whose words are all in a name counts.
_WORDS: tuple[tuple[str, str], ...] = (
    ("H100 PCIe", "h100-pcie"),
    ("H100 NVL", "h100-nvl"),
    ("H100", "h100-80g"),
    ("H200 NVL", "h200-nvl"),
    ("H200", "h200"),
    ("GH200", "gh200"),
    ("GB200", "gb200"),
    ("B200", "b200"),
    ("A100 80GB", "a100-80g"),
    ("A100", "a100-40g"),
    ("A40", "a40"),
    ("L40S", "l40s"),
    ("L40", "l40"),
    ("L4", "l4"),
    ("RTX 4090", "rtx-4090"),
    ("RTX 3090", "rtx-3090"),
    ("MI300X", "mi300x"),
)
# Of a part of a GPU, or of another variant by the same name, no data sheet's figure is at hand.
_OTHER_VARIANTS = {"MIG", "LAPTOP", "D", "TI", "GRID", "VF"}
# The profile of a virtual GPU: gigabytes and kind, as in "NVIDIA L40S-12Q".
_VIRTUAL = re.compile(r"\d+[ABCQ]")


def device_named(torch_name: str) -> Device | None:
    """The GPU by its `torch.cuda.get_device_name`; None where it is not in the table, a part of one, or a virtual one.

    An A100 with PCIe counts as the SXM model of its memory: peaks are alike, links and bandwidth of memory are lower.
    """
    words = set(re.split(r"[ -]", torch_name.upper()))
    if words & _OTHER_VARIANTS or any(map(_VIRTUAL.fullmatch, words)):
        return None
    return next((DEVICES[ours] for theirs, ours in _WORDS if words.issuperset(theirs.upper().split())), None)


def find_device(written: LocalPath | str) -> Device:
    """A GPU by its name in `DEVICES`, or of a YAML file with the fields of `Device`; its name wins over a file's.

    Raises `UserError` for a name that is neither, and for a file that cannot be read or has an unknown key, misses one, or
    holds a value that is no such number, with the line.
    """
    path = LocalPath(written) if isinstance(written, str) else written
    name = path.expanded()
    if name in DEVICES:
        return DEVICES[name]
    if os.path.isfile(name):  # pathlib's raises for names that are too long
        return _read_device(Path(name))
    where = f"{path.where}: " if path.where else ""
    raise UserError(
        f"{where}'{name}' is neither a GPU that is known{_meant(name)} nor a YAML file with one; "
        f"known: {', '.join(DEVICES)}"
    )


def _meant(name: str) -> str:
    """A hint for a name that is not known: all that it begins, what torch calls so, or the nearest."""
    begun = [known for known in DEVICES if known.startswith(name.lower())]
    called = device_named(name)
    if not begun and called is not None:
        begun = [called.name]
    quoted = " or ".join(f"'{known}'" for known in begun)
    return f" (did you mean {quoted}?)" if begun else did_you_mean(name.lower(), DEVICES)


def _read_device(path: Path) -> Device:
    file = read_mapping(path, "a GPU is a mapping of keys: " + ", ".join(_FIELDS))
    try:
        return TypeAdapter(Device).validate_python(file.values)
    except ValidationError as error:
        raise UserError("\n".join(_explained(problem, file) for problem in error.errors())) from None


def _explained(problem: Any, file: MappingFile) -> str:
    key = str(problem["loc"][0])
    where = f"{file.origins.get((key,), file.origins[()])}: {key}"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key{did_you_mean(key, _FIELDS)}; known keys: {', '.join(_FIELDS)}"
    if problem["type"] == "missing":
        return f"{where}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f" (found {problem['input']!r})" if "found" not in message else "")


def cpu_device(memory_bytes: int, flops: float, ranks: int) -> Device:
    """One of `ranks` ranks that compute on a host's CPUs. `memory_bytes`: of the host; `flops`: of one rank, measured.

    Each rank has an equal share of the memory. Ranks exchange bytes through the host's memory; the bandwidths of a
    desktop, 20 GB/s over all ranks, are an assumption.
    """
    share = 20e9 / ranks
    return Device(
        name="cpu",
        title=f"a CPU, {ranks} rank{'s' if ranks > 1 else ''} on the host",
        memory_bytes=memory_bytes // ranks,
        bf16_flops=flops,
        fp32_flops=flops,
        memory_bandwidth=share,
        link_bandwidth=share,
        network_bandwidth=1e9,
        host_bandwidth=share,
        per_node=ranks,
        source="the host's memory; peak: a matrix product measured here",
        kind="cpu",
    )
