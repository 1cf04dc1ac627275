"""Big pack plans on disk: built once, then memory-mapped, so that the ranks of a node share one copy.

All ranks may build the same plan at the same time: it is a pure function, the first to finish renames its folder, and
the others take that one. A plan that cannot be written (full or read-only disk), or is not as it was written, stays in
memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.files import atomic_folder
from bico_ds.data.loading.packing import PackPlan, fingerprint_of

logger = logging.getLogger(__name__)

# Of the algorithm: another version makes other plans of the same lengths.
_CODE_VERSION = 1
# In sequences; smaller plans are not worth the trouble.
_BIG = 1 << 20


def cached_plan(
    build: Callable[..., PackPlan], lengths: NDArray[np.integer], *, folder: Path, **arguments: int | None
) -> PackPlan:
    """Return `build(lengths, **arguments)`; with 2^20 sequences or more mapped from `folder`, and put there if missing."""
    if len(lengths) < _BIG:
        return build(lengths, **arguments)
    digest = hashlib.blake2b(np.ascontiguousarray(lengths, dtype=np.int32).data, digest_size=16)
    digest.update(json.dumps([_CODE_VERSION, sorted(arguments.items())]).encode())
    plan_folder = folder / digest.hexdigest()
    if not (plan_folder / "plan.json").is_file():
        plan = build(lengths, **arguments)
        try:
            _write(plan, plan_folder)
        except OSError:
            return plan
    try:
        plan = _map(plan_folder, sequences=len(lengths), capacity=arguments["capacity"])
    # What `np.load` raises for damaged files has no common type: from tokenize's errors to struct's.
    except Exception as error:
        logger.info("the pack plan in %s is damaged (%s) and was built anew: delete it", plan_folder, error)
        return build(lengths, **arguments)
    return plan


def _write(plan: PackPlan, folder: Path) -> None:
    try:
        with atomic_folder(folder) as temporary:
            # The name is part of the cache's format.
            np.save(temporary / "row_order.npy", plan.sequence_order)
            np.save(temporary / "bin_offsets.npy", plan.bin_offsets)
            meta = {"capacity": plan.capacity, "fingerprint": plan.fingerprint}
            (temporary / "plan.json").write_text(json.dumps(meta))
    except OSError:
        if not (folder / "plan.json").is_file():  # not another rank's, which came first
            raise


def _map(folder: Path, *, sequences: int, capacity: int | None) -> PackPlan:
    """Raises `ValueError` where the plan is not the one that its fingerprint names, or what reading its files raises."""
    meta = json.loads((folder / "plan.json").read_text())
    plan = PackPlan(
        sequence_order=np.load(folder / "row_order.npy", mmap_mode="r"),
        bin_offsets=np.load(folder / "bin_offsets.npy", mmap_mode="r"),
        **meta,
    )
    dtypes = (plan.sequence_order.dtype, plan.bin_offsets.dtype)
    if dtypes != (np.int32 if sequences < 2**31 else np.int64, np.int64):
        raise ValueError(f"columns of {dtypes}")
    if (plan.sequence_order.shape, plan.capacity) != ((sequences,), capacity):
        raise ValueError(f"{plan.sequence_order.shape} sequences in bins of {plan.capacity}")
    if fingerprint_of(plan.sequence_order, plan.bin_offsets) != plan.fingerprint:
        raise ValueError("another checksum")
    return plan
