"""Show runs and their state, from their folders; works with and without SLURM.

    bico-ds status                      all runs below runs/
    bico-ds status runs/sweep-a -w 10   these, shown anew every 10 seconds
    bico-ds status --json               for programs: one object per line

States: waiting (never started), starting (does not train yet), running, preempted (saved, to be resumed), done, failed,
lost: it was starting or running, and no process of it has been alive for half a minute; and unreadable: the reason names
the file's fault.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bico_ds.cluster.run_status import RunStatus, find_runs, read_statuses
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.common.printable import on_one_line
from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.config.arguments import local_path, positive_number

_REASON, _NAME = 60, 1000  # characters that are shown

COLORS = {
    "done": "green",
    "running": "cyan",
    "starting": "cyan",
    "preempted": "yellow",
    "failed": "red",
    "lost": "red",
    "unreadable": "red",
}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", type=local_path, default=[Path("runs")], help="run folders, or what holds them"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "-w", "--watch", type=positive_number, metavar="SECONDS", help="show it anew, until Ctrl-C"
    )


def show_status(options: Namespace) -> None:
    for path in options.paths:
        if not path.is_dir():
            raise UserError(f"no folder '{path}'")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.json:
        for status in read_statuses(find_runs(options.paths)):
            print(json.dumps(asdict(status)))
    elif options.watch is not None:
        watch(options.paths, options.watch, console)
    else:
        console.print(make_table(read_statuses(find_runs(options.paths))))


def watch(paths: list[Path], seconds: float, console: Console) -> None:
    """Show the table anew every few seconds, until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        statuses = read_statuses(find_runs(paths))
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(make_table(statuses), refresh=True)
                time.sleep(seconds)
                # There is a table to look at meanwhile: no line on locks that are watched.
                statuses = read_statuses(find_runs(paths), on_watch=lambda count, seconds: None)


def make_table(statuses: list[RunStatus]) -> FittingTable:
    table = FittingTable(caption="" if statuses else "no runs there")
    for name in ("run", "state", "step", "loss", "tokens/s", "checkpoint", "starts", "job", "last sign"):
        left = name in ("run", "state", "job")
        table.add_column(name, right=not left, whole=not left)
    for status in statuses:
        state = Text(status.state, style=COLORS.get(status.state, "white"))
        state.append(
            f" ({on_one_line(status.reason, most=_REASON)})" if status.reason else "", style="default"
        )
        if status.slow:
            state.append(f"; slow: {status.slow}", style="yellow")
        if status.excluded:
            state.append(f"; excluded: {', '.join(status.excluded)}", style="yellow")
        total = "?" if status.total_steps is None else str(status.total_steps)
        name = on_one_line(shorten(status.run), most=_NAME)
        table.add_row(
            name, state, "-" if status.step is None else f"{status.step}/{total}",
            "-" if status.loss is None else f"{status.loss:.3f}",
            "-" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
            str(status.checkpoint or "-"), str(status.starts), status.job or "-", ago(status.changed),
        )  # fmt: skip
    return table


def shorten(run: str) -> str:
    """Relative to here, where it is below."""
    path = Path(run).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else run


def ago(moment: float | None) -> str:
    """How long ago, in the largest fitting unit."""
    if moment is None:
        return "-"
    seconds = max(time.time() - moment, 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


main = Command(description=__doc__, add_options=add_options, run=show_status, only_shows=lambda options: True)


if __name__ == "__main__":
    main.start()
