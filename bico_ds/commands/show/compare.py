"""Compare runs: the table of the reversal tasks, and the picture of how they were learnt.

    bico-ds compare runs/tiny_ntp runs/tiny_bico
    bico-ds compare runs/evaluation/tiny_ntp.json runs/evaluation/tiny_bico.json

A RUN is a run folder, or a result file of `bico-ds evaluate`. Of run folders the work is shown, too: updates, tokens, FLOPs
and seconds, so that runs can be compared at equal compute. The difference of every later one from the first is shown
too, paired by prompt, where both were asked the same. Where the perplexity of a text is known (of texts in
`evaluation.tasks`, or by `bico-ds evaluate --retention`), the frontier of score and perplexity is drawn; blends by
`bico-ds export --blend` are joined by a line.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bico_ds.common.command_line import Command
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.report.comparison import compare_runs
from bico_ds.evaluation.report.frontier import TASK


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=local_path, help="a run folder or a result file"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=local_path,
        default=Path("runs/comparison"),
        help="folder to write (default: %(default)s)",
    )

    parser.add_argument(
        "--task", metavar="NAME", help=f"the task whose score the frontier shows (default: {TASK})"
    )
    parser.add_argument(
        "--text",
        metavar="NAME",
        help="the text whose perplexity it shows (default: each, in a panel of its own)",
    )


def compare(options: Namespace) -> None:
    compare_runs(options.runs, output=options.output, task=options.task, text=options.text)


main = Command(description=__doc__, add_options=add_options, run=compare)


if __name__ == "__main__":
    main.start()
