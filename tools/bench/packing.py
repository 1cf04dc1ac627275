#!/usr/bin/env python
"""Packing speed and fill, against TRL's best-fit decreasing in the same run.

    pip install --no-deps --target /tmp/trl trl       # for the comparison only
    PYTHONPATH=/tmp/trl python tools/bench/packing.py [--json] [--huge] [--trl-memory 5]

Three length distributions; ours is measured as the plan alone (which lengths share a bin) and with the
documents (which document goes where). TRL's `_pack_bfd` is called on one Arrow table, its most favourable
setting: `pack_dataset` packs batches of 1000 by default, which costs fill. It moves the tokens, and takes 17
bytes of memory for each, so it gets as many of the sequences as fit `--trl-memory` (GB); the fill is compared on
those. The run is refused where the machine has less memory than both sides need.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import psutil
import this_checkout  # noqa: F401  first on sys.path
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import positive
from bico_ds.data.loading.packing import build_pack_plan, pack_histogram

HUGE = 100_000_000  # sequences
DISTRIBUTIONS = ("facts, mean 39", "log-normal, mean 585", "uniform, mean 2035")
# Bytes, rounded up from the peaks of single cases: the process with its imports, ours and TRL's by what they grow with.
PROCESS_BYTES = 1e9
OUR_BYTES_PER_SEQUENCE = 40
TRL_BYTES_PER_SEQUENCE, TRL_BYTES_PER_TOKEN = 600, 20


Tokens = TypeVar("Tokens", int, NDArray[np.int64])


def gigabytes(text: str) -> float:
    """The type of an argument: more than 0 GB."""
    value = float(text)
    if not value > 0:
        raise ArgumentTypeError(f"must be more than 0, found {text}")
    return value


def needed_bytes(sequences: int, capacity: int, trl_bytes: float) -> float:
    """Return what the run takes at the most, when TRL may take `trl_bytes`: no more than it needs for all sequences."""
    ours = PROCESS_BYTES + OUR_BYTES_PER_SEQUENCE * sequences
    return ours + min(trl_bytes, sequences * trl_bytes_of_sequence(capacity))


def trl_bytes_of_sequence(tokens: Tokens) -> Tokens:
    """Return what TRL takes for a sequence of so many tokens, or for each of many."""
    return TRL_BYTES_PER_SEQUENCE + TRL_BYTES_PER_TOKEN * tokens


def check_memory(needed: float) -> None:
    """Print what the run will need; end it where the machine has less."""
    available = psutil.virtual_memory().available
    print(f"needs at most {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")
    if available < needed:
        sys.exit("too little memory: set --sequences, or --trl-memory, lower")


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


def trl_share(lengths: NDArray[np.int32], trl_bytes: float) -> NDArray[np.int32]:
    """As many of the first lengths as TRL can pack in `trl_bytes`."""
    needed = np.cumsum(trl_bytes_of_sequence(lengths.astype(np.int64)))
    return lengths[: int(np.searchsorted(needed, trl_bytes, side="right"))]


def trl_bins(lengths: NDArray[np.int32], capacity: int) -> tuple[float, int]:
    """Return TRL's time and number of bins."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)})
    try:
        seconds, packed = timed(lambda: _pack_bfd(table, capacity), repeats=1)
    except TypeError:  # only 32-bit lists
        table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)})
        seconds, packed = timed(lambda: _pack_bfd(table, capacity), repeats=1)
    return seconds, packed.num_rows


def measure(name: str, count: int, capacity: int, trl_bytes: float) -> list[dict[str, Any]]:
    """Measure both sides on one distribution; `trl_bytes` 0: ours alone."""
    lengths = draw_lengths(name, count, capacity)
    plan_seconds, groups = timed(
        lambda: pack_histogram(np.bincount(lengths, minlength=capacity + 1), capacity=capacity)
    )
    full_seconds, plan = timed(lambda: build_pack_plan(lengths, capacity=capacity, seed=0))
    assert groups.num_bins == plan.num_bins
    trl_speed = trl_fill = None
    if trl_bytes:
        lengths = trl_share(lengths, trl_bytes)
        plan = build_pack_plan(lengths, capacity=capacity, seed=0)
        trl_seconds, trl_num_bins = trl_bins(lengths, capacity)
        trl_speed = len(lengths) / trl_seconds / 1e6
        trl_fill = fill(lengths, trl_num_bins, capacity)
    most = fill(lengths, -(-int(lengths.sum(dtype=np.int64)) // capacity), capacity)
    return [
        row(f"{name}: plan", count / plan_seconds / 1e6, trl_speed, "M sequences/s"),
        row(f"{name}: plan and documents", count / full_seconds / 1e6, trl_speed, "M sequences/s"),
        row(
            f"{name}: fill of {len(lengths):,} sequences (no bins can exceed {most:.5f})",
            fill(lengths, plan.num_bins, capacity),
            trl_fill,
            "share",
        ),
    ]


def fill(lengths: NDArray[np.int32], num_bins: int, capacity: int) -> float:
    """Return the share of the bins that holds tokens."""
    return int(lengths.sum(dtype=np.int64)) / (num_bins * capacity)


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
    lengths = np.tile(draw_lengths("facts, mean 39", HUGE // 100, capacity), 100)
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


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--sequences", type=positive, default=1_000_000)
    parser.add_argument("--capacity", type=positive, default=4096)
    parser.add_argument("--trl-memory", type=gigabytes, default=5.0, help="GB that TRL may take (default 5)")
    parser.add_argument(
        "--huge", action="store_true", help="only 100 million sequences: time and peak memory"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def contradiction(options: Namespace) -> str | None:
    one = trl_bytes_of_sequence(options.capacity)
    if options.trl_memory * 1e9 < one:
        return f"--trl-memory: a sequence of {options.capacity} tokens takes {one / 1e9:.2g} GB; give more"
    return None


def run(options: Namespace) -> None:
    """Measure, print the table, and with --json a last line for machines."""
    if options.huge:
        check_memory(needed_bytes(HUGE, options.capacity, 0.0))
        rows = measure_huge(options.capacity)
    else:
        trl_bytes = options.trl_memory * 1e9 if find_spec("trl") else 0.0
        if not trl_bytes:
            print(
                "trl is not installed: only our side is measured (see the top of this file)", file=sys.stderr
            )
        check_memory(needed_bytes(options.sequences, options.capacity, trl_bytes))
        rows = [
            line
            for name in DISTRIBUTIONS
            for line in measure(name, options.sequences, options.capacity, trl_bytes)
        ]
    table = Table("what", "ours", "TRL" if not options.huge else "limit", "unit", "ratio")
    for line in rows:
        other, ratio = (f"{line[key]:.5g}" if line[key] is not None else "-" for key in ("other", "ratio"))
        table.add_row(line["name"], f"{line['ours']:.5g}", other, line["unit"], ratio)
    Console(width=120).print(table)
    if options.json:
        print(json.dumps({"rows": rows}))


main = Command(description=__doc__, add_options=add_options, contradiction=contradiction, run=run)


if __name__ == "__main__":
    main.start()
