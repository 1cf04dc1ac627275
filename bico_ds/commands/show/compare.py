"""Compare runs: the table of the reversal tasks, and the picture of how they were learnt.

    bico-ds compare runs/tiny_ntp runs/tiny_bico
    bico-ds compare runs/evaluation/tiny_ntp.json runs/evaluation/tiny_bico.json
    bico-ds compare runs/sweep-tiny_bico --by objectives.bico.mask.rate --sort n2d_reverse --format png,pdf

A RUN is a run folder, a folder of runs (of a sweep, say), or a result file of `bico-ds evaluate`. Runs whose recipes
differ in the seed alone are a group: its mean, its spread over runs, and a 95 % interval over persons and runs are shown,
and of every later group the difference from the first. comparison.csv has a row for every run and group.

Of single run folders the work is shown, too: updates, tokens, FLOPs and seconds, so that runs can be compared at equal
compute. The difference of every later one from the first is shown too, paired by prompt, where both were asked the same.
Where the perplexity of a text is known (of texts in `evaluation.tasks`, or by `bico-ds evaluate --retention`), the frontier
of score and perplexity is drawn; blends by `bico-ds export --blend` are joined by a line.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from bico_ds.common.command_line import Command
from bico_ds.common.printable import on_one_line
from bico_ds.config.arguments import local_path
from bico_ds.evaluation.report.comparison import View, compare_runs
from bico_ds.evaluation.report.frontier import TASK
from bico_ds.evaluation.report.plots import FORMATS


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
    parser.add_argument(
        "--by",
        metavar="KEY",
        action="append",
        default=[],
        help="runs with the same value of this key of their recipes are a group (repeatable; default: with the same recipe "
        "but for the seed)",
    )
    parser.add_argument("--ungrouped", action="store_true", help="each run stands alone")
    parser.add_argument(
        "--sort",
        metavar="METRIC",
        help="the best first: a task, a text, or any metric as metrics.jsonl names it after evaluation/",
    )
    parser.add_argument(
        "--format",
        dest="formats",
        metavar="FORMAT[,FORMAT]",
        type=formats,
        default=("png",),
        help=f"of the pictures: {', '.join(FORMATS)} (default: png)",
    )


def formats(text: str) -> tuple[str, ...]:
    """Formats of pictures, with commas between."""
    found = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    for word in found:
        if word not in FORMATS:
            raise ArgumentTypeError(f"'{on_one_line(word, most=40)}' is none of {', '.join(FORMATS)}")
    return found


def _contradiction(options: Namespace) -> str | None:
    return "--by and --ungrouped contradict each other" if options.by and options.ungrouped else None


def compare(options: Namespace) -> None:
    view = View(by=options.by, ungrouped=options.ungrouped, sort=options.sort, formats=options.formats)
    compare_runs(options.runs, output=options.output, task=options.task, text=options.text, view=view)


main = Command(description=__doc__, add_options=add_options, run=compare, contradiction=_contradiction)


if __name__ == "__main__":
    main.start()
