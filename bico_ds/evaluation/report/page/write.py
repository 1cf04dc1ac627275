"""Write the report: one file with all that is known of some runs, for who was not there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bico_ds import __version__
from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.evaluation.report.comparison import check_comparable
from bico_ds.evaluation.report.page.curves import held_out_losses, losses, score_curves
from bico_ds.evaluation.report.page.events import events
from bico_ds.evaluation.report.page.html import Html, element, listed
from bico_ds.evaluation.report.page.numbers import amount, in_words
from bico_ds.evaluation.report.page.repeat import repeat
from bico_ds.evaluation.report.page.retention import retention
from bico_ds.evaluation.report.page.settings import settings
from bico_ds.evaluation.report.page.source import ReportedRun, read_runs
from bico_ds.evaluation.report.page.speed import speed
from bico_ds.evaluation.report.page.style import style_sheet
from bico_ds.evaluation.report.page.tasks import sample_answers, task_table
from bico_ds.evaluation.report.page.verdict import verdict

NAME = "report.html"
_MARK = '<meta name="generator" content="bico_ds report"/>'
_HEAD_BYTES = 1000  # in which the mark of a report of ours stands

_SOURCES = (
    f"Written by bico_ds {__version__}. All figures are from the files of the runs.",
    "The reversal curse, and the four tasks: Berglund et al., arXiv 2309.12288. BICO: arXiv 2311.07468.",
)

# After the verdict, each with its name in the list of contents.
_SECTIONS: dict[str, Callable[[Sequence[ReportedRun]], Html | None]] = {
    "Curves": score_curves,
    "Tasks": task_table,
    "Answers": sample_answers,
    "Retention": retention,
    "Losses": losses,
    "Held-out losses": held_out_losses,
    "Settings": settings,
    "Speed": speed,
    "Events": events,
    "Run it again": repeat,
}


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write a report of runs as one HTML file that asks the network for nothing; return its path.

    `paths`: run folders, or result files of `bico-ds evaluate`. `output`: None for report.html in the first run's folder.
    A file that is there is replaced where it is a report, too. Raises `UserError` for a path that is no run, for tasks that
    are scored differently, and where `output` cannot be written, or is something else.
    """
    runs = read_runs(paths)
    check_comparable([run.compared for run in runs])
    if output is None:
        output = (paths[0] if paths[0].is_dir() else paths[0].parent) / NAME
    _refuse_other(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A name of a file may hold bytes that are no text.
        write_atomically(output, page_of(runs).encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"{output}: the report cannot be written ({error.strerror}); name another file with --output"
        ) from error
    return output


def _refuse_other(output: Path) -> None:
    """Raise `UserError` where something lies that is no report."""
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file in it")
    if not os.path.lexists(output):
        return
    try:
        is_ours = output.is_file() and _MARK.encode() in output.open("rb").read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror}); name another file") from error
    if not is_ours:
        raise UserError(f"--output {output}: is there already and no report; name another file")


def page_of(runs: Sequence[ReportedRun]) -> str:
    """The HTML of the report."""
    sections = {title: found for title, make in _SECTIONS.items() if (found := make(runs)) is not None}
    title = f"{in_words([run.label for run in runs[:3]])}{' and more' if len(runs) > 3 else ''}: report"
    written = f"{amount(len(runs), 'run')} · written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    head = [
        element("meta", charset="utf-8"),
        Html(_MARK),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style_sheet())),
    ]
    body = [
        element("a", "Skip to the curves", href="#main", class_="skip"),
        element("header", element("p", written, class_="eyebrow"), verdict(runs), *_faults(runs)),
        element("nav", listed(_contents(sections)), aria_label="Contents"),
        element("main", *sections.values(), id="main"),
        element("footer", *(element("p", line) for line in _SOURCES)),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _contents(sections: dict[str, Html]) -> Iterator[Html]:
    for title, found in sections.items():
        identifier = found.partition('id="')[2].partition('"')[0]
        yield element("a", title, href=f"#{identifier}")


def _faults(runs: Sequence[ReportedRun]) -> Iterator[Html]:
    """What could not be read."""
    for run in runs:
        if run.faults:
            yield element(
                "p", f"Not all of {run.label} could be read: {'; '.join(run.faults)}.", class_="fault"
            )
