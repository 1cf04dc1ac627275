"""A table keeps its words whole at any width, and no row loses a cell."""

from __future__ import annotations

import random
import re

import pytest
from rich.cells import cell_len
from rich.text import Text

from bico_ds.common.terminal.fitting_table import FittingTable
from tests.common.whole_words import check_whole, shown

INTERVAL = "1.000 [1.00, 1.00]"


def table_of(columns: list[str], *, rows: int, instead: FittingTable | None = None) -> FittingTable:
    table = FittingTable(title="what is shown", caption="and below it a line on that", instead=instead)
    for name in columns:
        table.add_column(name, right=name != columns[0], whole=True)
    for number in range(rows):
        table.add_row(f"task_{number}", *[INTERVAL] * (len(columns) - 1))
    return table


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
@pytest.mark.parametrize("runs", [1, 2, 4, 9])
def test_every_word_and_every_figure_is_whole(width, runs):
    table = table_of(["task", *(f"run {number}" for number in range(runs))], rows=4)
    text = check_whole(lambda console: console.print(table), width, may_differ={"task"})
    assert text.count(INTERVAL) == 4 * runs


def test_texts_take_the_room_that_figures_leave():
    table = FittingTable()
    for name in ("item", "low", "how"):
        table.add_column(name, right=name == "low")
    table.add_row(
        "weights", "2.05 to 3.10", "kept whole in every rank, and gathered before each layer that needs them"
    )
    lines = check_whole(lambda console: console.print(table), 50).splitlines()
    assert "2.05 to 3.10" in lines[2]
    assert cell_len(lines[2].rstrip()) > 45


def test_a_form_that_fits_comes_before_one_that_breaks_names():
    runs = ["tiny_identity_bridge_of_all_names", "tiny_both_orders_of_all_names"]
    by_run = FittingTable()
    for name in ("task", "run", "score"):
        by_run.add_column(name, whole=name != "run")
    for run in runs:
        by_run.add_row("task_0", run, INTERVAL)
    table = table_of(["task", *runs], rows=1, instead=by_run)
    side_by_side, in_rows, broken = (
        shown(lambda console: console.print(table), width) for width in (100, 62, 43)
    )
    assert "run" not in side_by_side.split() and runs[0] in side_by_side
    assert "run" in in_rows.split() and runs[0] in in_rows
    assert "identity_" in broken.replace("_", "_ ").split() and INTERVAL in broken


def test_what_fits_in_no_form_is_a_list_with_every_cell_behind_its_header():
    table = table_of(["task", "a", "b"], rows=2)
    assert shown(lambda console: console.print(table), 24).splitlines()[1:7] == [
        "task_0", f"  a: {INTERVAL}", f"  b: {INTERVAL}", "task_1", f"  a: {INTERVAL}", f"  b: {INTERVAL}",
    ]  # fmt: skip
    assert f"  a:\n  {INTERVAL}" in shown(lambda console: console.print(table), 20)


def test_names_of_others_are_no_markup_and_of_any_width():
    table = FittingTable(title="[red]runs[/]")
    table.add_column("run")
    table.add_column("state [x]", whole=True)
    table.add_row("[bold]名前" * 9, Text("done [/]", style="green"))
    for width in (200, 80, 30, 7, 4):
        text = shown(lambda console: console.print(table), width)
        assert max(map(cell_len, text.splitlines())) <= width
        assert re.sub(r"[^名前]", "", text) == "名前" * 9


def test_random_tables_lose_no_letter_at_any_width():
    for _ in range(30):
        columns = [f"header{index} of it" for index in range(random.randint(1, 6))]
        cells = [
            [
                " ".join(
                    f"w{random.randint(0, 10 ** random.randint(0, 9))}" for _ in range(random.randint(0, 6))
                )
                for _ in columns
            ]
            for _ in range(3)
        ]
        table = FittingTable(boxed=random.random() < 0.5)
        for name in columns:
            table.add_column(name, right=random.random() < 0.5, whole=random.random() < 0.3)
        for row in cells:
            table.add_row(*row)
        text = shown(lambda console: console.print(table), random.randint(12, 130))  # noqa: B023
        letters = "".join(sorted(re.sub(r"\s", "", "".join(map("".join, cells)))))
        found = "".join(sorted(re.sub(r"[^w\d]", "", re.sub(r"header\d", "", text))))
        assert found == letters
