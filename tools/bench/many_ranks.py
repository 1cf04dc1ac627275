#!/usr/bin/env python
"""What a rank does in the start of a run of many ranks, one rank at a time on this machine, and how it grows with them.

    python tools/bench/many_ranks.py [--worlds 8 64 256] [--stage 3] [--calls] [--convert 8 32 64] [--json]

Rank 0, a drawn one and the last of every world are started in turn, each from `bico_ds.training.start.train` to
the end of one step and its checkpoint, on torch's fake process group (see one_of_many.py for what that shows and what
not). --calls counts the Python calls, which load on the machine does not change; the seconds are then too long.
--convert writes the checkpoint of all ranks of a world, rank by rank, and makes the universal form of it, as a resume at
another number of ranks does.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import one_of_many
import this_checkout  # noqa: F401  first on sys.path
from one_of_many import LOOP, START, Report
from rich.console import Console
from rich.table import Table

from bico_ds.checkpoint import manifest, universal
from bico_ds.common.command_line import Command
from bico_ds.config.arguments import positive
from bico_ds.config.load import load_recipe
from bico_ds.config.schema import Recipe
from bico_ds.training.assembly import prepare_stores

BINS_PER_RANK = 4
# Of each phase: the start, and the loop of one step with its checkpoint. Objects: what ranks pickle and gather.
FIGURES = ("CPU s", "calls", "messages", "bytes", "bytes of objects")
COLUMNS = (
    "ranks",
    "rank",
    "micro-batches",
    "MB grown",
    *(f"{p}: {f}" for p in (START, LOOP) for f in FIGURES),
)
EXPONENTS = (
    "MB grown",
    "start: CPU s",
    "start: bytes",
    "loop: CPU s",
    "loop: bytes",
    "loop: bytes of objects",
)


def recipe_of(world_size: int, stage: int, cache: Path) -> Recipe:
    """The smallest recipe, with one step of as many micro-batches on every rank, whatever the world."""
    return load_recipe(
        "tiny_base",
        [
            "training.steps=1",
            # Weights gathered by the fake group hold what was in unused memory.
            "training.on_nonfinite=skip",
            f"training.global_batch_bins={BINS_PER_RANK * world_size}",
            "schedule.warmup_steps=0",
            "schedule.decay_steps=0",
            "checkpoint.export=false",
            f"data.cache_dir={cache}",
            f"deepspeed.overrides={{zero_optimization: {{stage: {stage}}}}}",
        ],
    )


def measure(
    world_size: int, stage: int, ranks: list[int], folder: Path, *, counts_calls: bool
) -> list[Report]:
    """Start these ranks of a world, rank 0 first."""
    assert ranks[0] == 0
    recipe, own = recipe_of(world_size, stage, folder / "data"), folder / f"world-{world_size}"
    own.mkdir()
    # Or else rank 0 of the first world would make them.
    prepare_stores(recipe, progress=False)
    return [one_of_many.alone(recipe, rank, world_size, own, counts_calls=counts_calls) for rank in ranks]


def chosen_ranks(world_size: int) -> list[int]:
    drawn = random.Random(world_size).sample(range(world_size), 1)
    return sorted({0, *drawn, world_size - 1})


def cells(report: Report) -> list[Any]:
    """A line of the table, by `COLUMNS`."""
    line = [report.world_size, report.rank, report.micro_batches, round(report.grown_bytes / 1e6)]
    for phase in report.phases.values():
        messages, sizes = zip(*phase.traffic.values(), strict=True)
        objects = phase.traffic.get("allgather_", (0, 0))[1]
        line += [round(phase.cpu_seconds, 2), phase.calls, sum(messages), sum(sizes) - objects, objects]
    return line


def growth(first: Report, last: Report) -> list[dict[str, Any]]:
    """Rank 0 of the smallest and of the largest world: what each figure is, and the exponent of the ranks it grows by."""
    was, now = (dict(zip(COLUMNS, cells(report), strict=True)) for report in (first, last))
    times = math.log(last.world_size / first.world_size)
    return [
        {
            "name": f"{name}, {last.world_size} ranks against {first.world_size}: grows as ranks^"
            f"{math.log(now[name] / was[name]) / times:.2f}",
            "ours": now[name],
            "other": was[name],
            "unit": name.split()[-1],
            "ratio": now[name] / was[name],
        }
        for name in EXPONENTS
    ]


def converted(world_size: int, stage: int, folder: Path) -> list[Any]:
    """The checkpoint of a whole world, verified, and made universal: ranks, files, bytes and the seconds of both."""
    started = time.perf_counter()
    measure(world_size, stage, list(range(world_size)), folder, counts_calls=False)
    checkpoints = folder / f"world-{world_size}" / "run" / "checkpoints"
    whole = checkpoints / manifest.name_of(1)
    content = json.loads((whole / manifest.MANIFEST).read_text(encoding="utf-8"))
    # Each rank but the first left its files where rank 0 had told it to.
    for file in checkpoints.glob(".*.incomplete/*"):
        file.rename(whole / file.name)
    files = manifest.file_table(whole, [file for file in whole.iterdir() if file.suffix == ".pt"])
    manifest.write_manifest(whole, {k: v for k, v in content.items() if k != "seal"} | {"files": files})
    written = time.perf_counter()
    found = manifest.verify(whole)
    verified = time.perf_counter()
    universal.convert(found, {**found.layout, "ranks": 8}, print)
    done = time.perf_counter()
    return [
        world_size, len(files), found.bytes, round(written - started, 1), round(verified - written, 2),
        round(done - verified, 1),
    ]  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--worlds", type=positive, nargs="+", default=[8, 64, 256], metavar="N")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO (default 3)")
    parser.add_argument("--calls", action="store_true", help="count Python calls")
    parser.add_argument(
        "--convert", type=positive, nargs="+", default=[], metavar="N", help="these worlds' checkpoints"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def contradiction(options: Namespace) -> str | None:
    return "--worlds: give two worlds or more" if len(set(options.worlds)) < 2 else None


def run(options: Namespace) -> None:
    """Measure, print the tables, and with --json a last line for machines."""
    worlds = sorted(set(options.worlds))
    with tempfile.TemporaryDirectory() as scratch:
        reports = {
            world: measure(
                world, options.stage, chosen_ranks(world), Path(scratch), counts_calls=options.calls
            )
            for world in worlds
        }
        rows = growth(reports[worlds[0]][0], reports[worlds[-1]][0])
        tables: list[dict[str, Any]] = [
            {
                "title": f"a rank's start, step and checkpoint under ZeRO-{options.stage}",
                "columns": COLUMNS,
                "rows": [cells(report) for world in worlds for report in reports[world]],
            }
        ]
    if options.convert:
        with tempfile.TemporaryDirectory() as scratch:
            tables.append(
                {
                    "title": f"resume of a ZeRO-{options.stage} checkpoint at 8 ranks: rank 0's work before the others join",
                    "columns": ("ranks", "files", "bytes", "writing s", "verifying s", "converting s"),
                    "rows": [
                        converted(world, options.stage, Path(scratch)) for world in sorted(options.convert)
                    ],
                }
            )
    for content in tables:
        table = Table(*content["columns"], title=content["title"])
        for line in content["rows"]:
            table.add_row(*(f"{cell:,}" for cell in line))
        Console(width=150).print(table)
    for row in rows:
        print(row["name"])
    if options.json:
        print(json.dumps({"rows": rows, "tables": tables, "wrong": [], "notes": [one_of_many.__doc__]}))


main = Command(description=__doc__, add_options=add_options, contradiction=contradiction, run=run)


if __name__ == "__main__":
    main.start()
