"""Progress is a bar on a terminal, and a line now and then in a log."""

from __future__ import annotations

import io
import time
from functools import partial

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bico_ds.common import progress
from bico_ds.common.progress import Progress

SHORT, LONG = 0.05, 600.0  # what has passed after a pause, and what has not on the busiest machine


def shown(out: io.StringIO, *, is_terminal: bool, enabled: bool = True) -> Progress:
    console = Console(file=out, force_terminal=is_terminal, width=60)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(console, *columns, enabled=enabled)


def test_a_log_gets_a_line_at_most_every_so_often_and_those_that_are_due_at_once(monkeypatch):
    out, between = io.StringIO(), partial(monkeypatch.setattr, progress, "SECONDS_BETWEEN_LINES")
    with shown(out, is_terminal=False) as bar:
        bar.begin("work", total=4)
        between(LONG)
        bar.update(1, "1/4")
        time.sleep(2 * SHORT)
        between(SHORT)
        bar.update(2, "2/4")
        between(LONG)
        bar.update(3, "3/4", text="[bold]never shown[/]")
        bar.update(4, "4/4", at_once=True)
        bar.print(
            "a [message] of any length, which is not wrapped at the width of a terminal that is not there"
        )
    assert out.getvalue().splitlines() == [
        "2/4",
        "4/4",
        "a [message] of any length, which is not wrapped at the width of a terminal that is not there",
    ]


def test_a_terminal_gets_a_bar_and_no_lines():
    out = io.StringIO()
    with shown(out, is_terminal=True) as bar:
        bar.begin("work", total=4, completed=1)
        bar.update(3, "a plain line", text="loss [cyan]1.5[/]", at_once=True)
        bar.print("a message")
    text = out.getvalue()
    assert "work" in text and "3/4" in text and "1.5" in text
    assert "a message" in text
    assert "a plain line" not in text and "[cyan]" not in text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_ranks_are_silent(is_terminal):
    out = io.StringIO()
    with shown(out, is_terminal=is_terminal, enabled=False) as bar:
        bar.begin("work", total=4)
        bar.update(4, "4/4", at_once=True)
        bar.print("a message")
    assert out.getvalue() == ""
