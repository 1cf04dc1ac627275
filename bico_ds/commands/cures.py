"""Train every cure from tiny_base at equal updates, with the demo's program, and compare them in one picture.

    bico-ds cures                         into runs/NAME; the table and cures.png into runs/cures
    bico-ds cures --runs runs/other --ranks 1

A run that is done already is not trained again, and one that was stopped goes on; tiny_base, tiny_ntp and tiny_bico are the
demo's own.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

from rich.console import Console

from bico_ds.commands.demo import add_training_options, runs_from_base, train_all
from bico_ds.common.command_line import Command
from bico_ds.evaluation.report.comparison import compare_runs
from bico_ds.evaluation.report.overview import plot_overview
from bico_ds.evaluation.report.runs import load_runs

# The control first: the table shows the difference of every later run from it.
CURES = (
    "tiny_ntp",
    "tiny_bico",
    "tiny_bico_same",
    "tiny_abi",
    "tiny_mlm_u",
    "tiny_reverse",
    "tiny_masked_ft",
    "tiny_both_orders",
    "tiny_identity_bridge",
)


def add_options(parser: ArgumentParser) -> None:
    add_training_options(parser)


def train_and_compare(options: Namespace) -> None:
    console = Console(soft_wrap=True)
    started = time.monotonic()
    train_all(runs_from_base(CURES, options.runs, options.ranks), console)
    console.print()
    paths, output = [options.runs / name for name in CURES], options.runs / "cures"
    compare_runs(paths, output=output, console=console)
    picture = output / "cures.png"
    plot_overview(load_runs(paths), picture)
    console.print(
        f"\nThe picture: {picture}. The cures took {(time.monotonic() - started) / 60:.1f} minutes."
    )


main = Command(description=__doc__, add_options=add_options, run=train_and_compare)


if __name__ == "__main__":
    main.start()
