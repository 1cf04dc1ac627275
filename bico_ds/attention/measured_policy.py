"""What was measured of attention on GPUs: a file per architecture, written by tools/bench/gpu_policy.py, read by `auto`.

Such a file says three things: which kernels agreed with the oracle on that GPU; how long each flash kernel took; and from
which document length on its two passes are faster than the Triton kernels, or than dense tiles. Where there is no file,
`auto` has its own order of flash kernels, the estimates of `bico_ds/attention/layout.py` hold, and the Triton kernels run
only by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bico_ds import __version__
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.attention.plan import Mode
from bico_ds.attention.triton.row_blocks import BlockSizes
from bico_ds.common.errors import UserError

MEASURED = Path(__file__).parent / "measured"
_TRITON = "triton"

_Cost = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Length = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Bound = Annotated[float, Field(gt=0, le=0.1)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Dense tiles or the Triton kernels, beside the two passes of a flash kernel.

    `flash_from`, `causal_flash_from`: the length in kept tokens from which the flash kernel is faster, bidirectional (two
    passes) and causal (one); 1 where it always is. Never beyond the longest document measured. `live_cost`: of a pair
    of a live query and a key, in units of plain two-pass flash (`LayoutPolicy.tile_cost`).
    """

    __pydantic_config__ = _CLOSED

    flash_from: _Length
    causal_flash_from: _Length
    live_cost: _Cost


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Milliseconds of the op, forward and backward, on documents of `length` tokens, equally many for every kernel."""

    __pydantic_config__ = _CLOSED

    mode: Mode
    length: Annotated[int, Field(ge=1)]
    ms: _Cost


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One flash kernel at one head dimension, in bf16.

    `times`: empty where it was not timed. `hidden_cost`: of a pair with hidden keys, in the units of
    `Alternative.live_cost`; None where it was not measured. `tiles` and `triton`: likewise.
    """

    __pydantic_config__ = _CLOSED

    kernel: str
    head_dim: int
    times: tuple[KernelTime, ...]
    hidden_cost: _Cost | None
    tiles: Alternative | None
    triton: Alternative | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case of a backend beside the dense fp64 oracle: the worst of out and the gradients of q, k, v.

    `scale_error`: how far the factor, by least squares, between a tensor and the oracle's is from 1. `largest_error`: of one
    entry, relative to the largest. None where an error is not finite.
    """

    __pydantic_config__ = _CLOSED

    backend: str
    case: str
    dtype: str
    head_dim: int
    scale_error: _Error
    scale_bound: _Bound
    largest_error: _Error
    largest_bound: _Bound

    @property
    def is_right(self) -> bool:
        pairs = ((self.scale_error, self.scale_bound), (self.largest_error, self.largest_bound))
        return all(error is not None and error <= bound for error, bound in pairs)


@dataclass(frozen=True, kw_only=True)
class MeasuredPolicy:
    """All that one file says. `date` is ISO's; `capability` CUDA's compute capability."""

    __pydantic_config__ = _CLOSED

    format: Literal[2] = 2
    rehearsal: bool
    capability: tuple[int, int]
    gpu: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    driver: str
    versions: Mapping[str, str]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def origin(self) -> str:
        """GPU, date, and versions of which another one runs now."""
        running = running_versions()
        shared = [name for name in self.versions if name in running]
        differing = [n for n in shared if _minor(self.versions[n]) != _minor(running[n])]
        others = [f", with {name} {self.versions[name]} (now {running[name]})" for name in differing]
        return f"{self.gpu}, {self.date}{''.join(others)}"

    def of(self, kernel: str, head_dim: int) -> Measurement | None:
        """What was measured of a flash kernel at a head dimension."""
        found = (m for m in self.measurements if (m.kernel, m.head_dim) == (kernel, head_dim))
        return next(found, None)

    def objection(self, backend: str, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why a backend may not be called right for such inputs, as a clause; None where it is right.

        Every case of this dtype and head dimension must be right, and every case that the file has of any must be there:
        one that crashed the process, or came too late, left no comparison.
        """
        name = str(dtype).removeprefix("torch.")
        inputs = f"in {name} at head dimension {head_dim}"
        all_cases = [c for c in self.comparisons if c.backend == backend]
        cases = [c for c in all_cases if (c.dtype, c.head_dim) == (name, head_dim)]
        if not cases:
            return f"was not compared with the oracle {inputs}"
        if wrong := ", ".join(c.case for c in cases if not c.is_right):
            return f"was wrong there ({wrong})"
        compared = {c.case for c in cases}
        missing = dict.fromkeys(c.case for c in all_cases if c.case not in compared)
        return (
            f"was not compared with the oracle {inputs} in every case ({', '.join(missing)})"
            if missing
            else None
        )


@functools.cache
def _file_format() -> TypeAdapter[MeasuredPolicy]:
    return TypeAdapter(MeasuredPolicy)


def file_name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}.json"


def read_measured_policy(capability: tuple[int, int], folder: Path = MEASURED) -> MeasuredPolicy | None:
    """What was measured on GPUs of this compute capability; None where nothing was.

    Raises `UserError` for a file that cannot be read, of another format, with impossible values, of another GPU, or of a
    rehearsal.
    """
    file = folder / file_name(capability)
    try:
        policy = _file_format().validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(file, f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise _refused(file, f"{place}: {first['msg']}, not {str(first['input'])[:40]!r}") from None
    if policy.rehearsal:
        raise _refused(file, "a rehearsal on a CPU, which says nothing of any GPU")
    if policy.capability != capability:
        raise _refused(file, f"of another GPU: {policy.gpu}, compute capability {policy.capability}")
    return policy


def running_versions() -> dict[str, str]:
    """Versions of what decides a kernel's speed and results, as far as it is installed."""
    versions = {"bico_ds": __version__}
    for name in ("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def encode(policy: MeasuredPolicy) -> bytes:
    """The content of a file."""
    return _file_format().dump_json(policy, indent=1) + b"\n"


def order_by_speed(
    measured: MeasuredPolicy | None, default: tuple[str, ...], *, dtype: torch.dtype, head_dim: int
) -> tuple[tuple[str, ...], list[str]]:
    """The flash kernels in the order in which `auto` tries them; and why, for the log, where that was measured.

    Those that were right on that GPU for such inputs come first, the fastest before the others, by the sum of their times
    on the documents that all of them were timed on; then the rest of `default`.
    """
    if measured is None:
        return default, []
    right = {
        m.kernel: {(time.mode, time.length): time.ms for time in m.times}
        for m in measured.measurements
        if m.head_dim == head_dim and m.times and measured.objection(m.kernel, dtype, head_dim) is None
    }
    shared = set.intersection(*map(set, right.values())) if right else set()
    if not shared:
        return default, []
    total = {kernel: sum(times[case] for case in shared) for kernel, times in right.items()}
    order = sorted(total, key=total.__getitem__)
    listed = ", ".join(f"{kernel} {total[kernel]:.3g} ms" for kernel in order)
    rest = (kernel for kernel in default if kernel not in total)
    return (*order, *rest), [f"the order is that of their times on {measured.origin}: {listed}"]


def choose_policy(
    measured: MeasuredPolicy | None,
    estimate: LayoutPolicy,
    *,
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    blocks: BlockSizes | None,
    refusal: str | None,
) -> tuple[LayoutPolicy, str]:
    """The policy of a flash kernel, and where it comes from, for the log.

    The Triton kernels take documents shorter than measured crossovers, if they were right on that GPU and are faster for
    any; `blocks`: how they would; `refusal`: why they cannot run, as a clause. `estimate` holds where nothing was measured.
    Another version of torch, Triton or bico_ds than the measured one is named, and no reason against.
    """
    if measured is None:
        note = "costs are estimates: none were measured on this architecture"
        if refusal is not None:
            return estimate, f"{note}; not triton, which {refusal}"
        # By any estimate it beats tiles for live rows; for whole documents it has to be measured.
        return replace(estimate, blocks=blocks, hidden_cost=math.inf), f"{note}; triton for live rows"
    found = measured.of(kernel, head_dim)
    if found is None:
        unknown = f"{kernel} at head dimension {head_dim} was not measured on {measured.origin}"
        return estimate, f"costs are estimates: {unknown}"
    beside_tiles = _policy_beside(found.tiles, found, estimate)
    objection = refusal or measured.objection(_TRITON, dtype, head_dim) or _no_gain(found.triton)
    if objection:
        return beside_tiles, f"costs measured on {measured.origin}; not triton, which {objection}"
    policy = replace(_policy_beside(found.triton, found, estimate), blocks=blocks)
    lengths = f"{policy.flash_from:.0f} tokens, {policy.causal_flash_from:.0f} where causal"
    return policy, f"triton for live rows and documents below {lengths}, as measured on {measured.origin}"


def _policy_beside(other: Alternative | None, found: Measurement, estimate: LayoutPolicy) -> LayoutPolicy:
    if other is None:
        return estimate
    can_hide = not math.isinf(estimate.hidden_cost)  # here, whatever could where it was measured
    return replace(
        estimate,
        flash_from=other.flash_from,
        causal_flash_from=other.causal_flash_from,
        tile_cost=other.live_cost,
        hidden_cost=found.hidden_cost if can_hide and found.hidden_cost is not None else estimate.hidden_cost,
    )


def _no_gain(triton: Alternative | None) -> str | None:
    if triton is None:
        return "was not timed beside this kernel"
    return "is faster for no length" if triton.flash_from == triton.causal_flash_from == 1 else None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _refused(file: Path, problem: str) -> UserError:
    return UserError(f"{file}: {problem}; measure anew by tools/bench/gpu_policy.py, or remove the file")
