"""Write a report of runs: one HTML file for who must see what was asked, answered and done.

    bico-ds report runs/tiny_bico runs/tiny_ntp
    bico-ds report runs/tiny_bico --output tiny_bico.html

A RUN is a run folder, a folder of runs, or a result file of `bico-ds evaluate`. The file holds everything itself and asks
the network for nothing: question and answer, curves, tasks, sample answers, retention, losses, settings that differ, speed
and memory, what happened, and how to run it again. A report that is there is replaced; any other file is refused. 2: wrong
usage or input.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.report.page.write import NAME, write_report


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=local_path,
        help="a run folder, a folder of runs, or a result file",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=local_path,
        help=f"file to write (default: {NAME} in the first run's folder)",
    )


def report(options: Namespace) -> None:
    output: Path | None = options.output
    print(f"written: {write_report(options.runs, output)}")


main = Command(description=__doc__, add_options=add_options, run=report)


if __name__ == "__main__":
    main.start()
