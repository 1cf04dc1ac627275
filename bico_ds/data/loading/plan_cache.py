"""Big pack plans on disk: built once, then memory-mapped, so that the ranks of a node share one copy.

All ranks may build the same plan at the same time: it is a pure function, the first to finish names the
folder, and the others take what is there. A plan that cannot be written (full or read-only disk) stays in
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.files import atomic_folder
from bico_ds.data.loading.packing import PackPlan

_CODE_VERSION = 1  # of the algorithm: another one makes other plans of the same lengths
_BIG = 1 << 20  # rows; smaller plans take less memory than the trouble is worth


def cached_plan(
    build: Callable[..., PackPlan], row_lengths: NDArray[np.integer], *, folder: Path, **arguments: int | None
) -> PackPlan:
    """Return `build(row_lengths, **arguments)`; with 2^20 rows or more from `folder`, or put there."""
    if len(row_lengths) < _BIG:
        return build(row_lengths, **arguments)
    lengths = np.ascontiguousarray(row_lengths, dtype=np.int32)
    digest = hashlib.blake2b(lengths.data, digest_size=16)
    digest.update(json.dumps([_CODE_VERSION, sorted(arguments.items())]).encode())
    place = folder / digest.hexdigest()
    if not (place / "plan.json").is_file():
        plan = build(row_lengths, **arguments)
        try:
            _write(plan, place)
        except OSError:
            return plan
    return _map(place)


def _write(plan: PackPlan, place: Path) -> None:
    try:
        with atomic_folder(place) as temporary:
            np.save(temporary / "row_order.npy", plan.row_order)
            np.save(temporary / "bin_offsets.npy", plan.bin_offsets)
            meta = {"capacity": plan.capacity, "fingerprint": plan.fingerprint}
            (temporary / "plan.json").write_text(json.dumps(meta))
    except OSError:
        if not (place / "plan.json").is_file():  # not another rank's, which came first
            raise


def _map(place: Path) -> PackPlan:
    meta = json.loads((place / "plan.json").read_text())
    return PackPlan(
        row_order=np.load(place / "row_order.npy", mmap_mode="r"),
        bin_offsets=np.load(place / "bin_offsets.npy", mmap_mode="r"),
        **meta,
    )
