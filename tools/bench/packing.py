#!/usr/bin/env python
"""Packing speed and fill, against TRL's best-fit decreasing in the same run.

    pip install --no-deps --target /tmp/trl trl       # for the comparison only
    PYTHONPATH=/tmp/trl python tools/bench/packing.py [--json] [--huge]

Three length distributions; ours is measured as the plan alone (which lengths share a bin) and with the
documents (which document goes where). TRL's `_pack_bfd` is called on one Arrow table of the whole data set,
its most favourable setting: `pack_dataset` packs batches of 1000 by default, which costs fill.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bico_ds.data.packing import build_pack_plan, pack_histogram


def draw_lengths(name: str, count: int, capacity: int) -> NDArray[np.int32]:
    """Return lengths int32 [count]: like the facts (mean 39), log-normal (mean 585), uniform (mean 2035)."""
    rng = np.random.default_rng(0)
    draws = {
        "facts, mean 39": lambda: rng.normal(39, 8, count),
        "log-normal, mean 585": lambda: rng.lognormal(np.log(585) - 0.5, 1.0, count),
        "uniform, mean 2035": lambda: rng.uniform(1, 4070, count),
    }
    return np.clip(draws[name](), 1, capacity).astype(np.int32)


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Return the best time of `repeats`, and the result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - begin)
    return best, result


def trl_bins(lengths: NDArray[np.int32], capacity: int) -> tuple[float, int] | None:
    """Return TRL's time and number of bins; None where it is not installed."""
    try:
        import pyarrow as pa
        from trl.data_utils import _pack_bfd
    except ImportError:
        return None
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)})
    try:
        seconds, packed = timed(lambda: _pack_bfd(table, capacity), repeats=1)
    except TypeError:  # only 32-bit lists
        table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)})
        seconds, packed = timed(lambda: _pack_bfd(table, capacity), repeats=1)
    return seconds, packed.num_rows


def measure(name: str, count: int, capacity: int) -> list[dict[str, Any]]:
    """Measure both sides on one distribution."""
    lengths = draw_lengths(name, count, capacity)
    tokens = int(lengths.sum(dtype=np.int64))
    plan_seconds, groups = timed(
        lambda: pack_histogram(np.bincount(lengths, minlength=capacity + 1), capacity=capacity)
    )
    full_seconds, plan = timed(lambda: build_pack_plan(lengths, capacity=capacity, seed=0))
    assert groups.num_bins == plan.num_bins
    theirs = trl_bins(lengths, capacity)
    trl_speed = count / theirs[0] / 1e6 if theirs else None
    trl_fill = tokens / (theirs[1] * capacity) if theirs else None
    bound = tokens / (-(-tokens // capacity) * capacity)
    return [
        row(f"{name}: plan", count / plan_seconds / 1e6, trl_speed, "M sequences/s"),
        row(f"{name}: plan and documents", count / full_seconds / 1e6, trl_speed, "M sequences/s"),
        row(
            f"{name}: fill (no bins can exceed {bound:.5f})",
            tokens / (plan.num_bins * capacity),
            trl_fill,
            "share",
        ),
    ]


def row(name: str, ours: float, other: float | None, unit: str) -> dict[str, Any]:
    """One line of the table."""
    return {
        "name": name,
        "ours": ours,
        "other": other,
        "unit": unit,
        "ratio": ours / other if other else None,
    }


def measure_huge(capacity: int) -> list[dict[str, Any]]:
    """100 million sequences: seconds, and the most memory this process ever held."""
    lengths = draw_lengths("facts, mean 39", 1_000_000, capacity)
    lengths = np.tile(lengths, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(lambda: build_pack_plan(lengths, capacity=capacity, seed=0), repeats=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"lengths themselves: {lengths.nbytes / 2**30:.2f} GiB; peak before packing: {before / 2**20:.2f} GiB"
    )
    return [
        row("100 M sequences: time, other = limit", seconds, 60.0, "s"),
        row("100 M sequences: peak memory, other = limit", peak, 4e9 / 2**30, "GiB"),
    ]


def main() -> None:
    """Measure, print the table, and with --json a last line for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument(
        "--huge", action="store_true", help="only 100 million sequences: time and peak memory"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.huge:
        rows = measure_huge(args.capacity)
    else:
        names = ("facts, mean 39", "log-normal, mean 585", "uniform, mean 2035")
        rows = [line for name in names for line in measure(name, args.sequences, args.capacity)]
        if rows[0]["other"] is None:
            print(
                "trl is not installed: only our side is measured (see the top of this file)", file=sys.stderr
            )
    table = Table("what", "ours", "TRL" if not args.huge else "limit", "unit", "ratio")
    for line in rows:
        other, ratio = (f"{line[key]:.5g}" if line[key] is not None else "-" for key in ("other", "ratio"))
        table.add_row(line["name"], f"{line['ours']:.5g}", other, line["unit"], ratio)
    Console(width=120).print(table)
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
