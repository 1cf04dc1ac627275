"""What a run shows: one live line on a terminal, plain lines elsewhere, and a banner before both."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest
from rich.console import Console
from rich.text import Text

from bico_ds.config.load import load_recipe
from bico_ds.data.loading.sample_order import StreamReport
from bico_ds.training.callbacks import console as module
from bico_ds.training.callbacks.banner import banner
from bico_ds.training.callbacks.base import RunStart, StepReport
from bico_ds.training.callbacks.console import ConsoleProgress
from tests.training.test_callbacks import report, tiny_plan

KINDS = ("ntp", "bico", "abi", "mlm_u", "masked_ft", "reverse")
MANY = [f"objectives=[{', '.join(f'{{kind: {kind}, probability: {1 / 6}}}' for kind in KINDS)}]"]


def report_of(step: int, objective: str = "ntp", loss: float = 1.25) -> StepReport:
    return report(step, objective=objective, loss=loss)


def started(console: Console, *, overrides: list[str] | None = None, **options) -> ConsoleProgress:
    progress = ConsoleProgress(console, **options)
    recipe = load_recipe("tiny_bico", overrides or [])
    progress.on_start(
        RunStart(recipe=recipe, first_step=0, total_steps=400, summary={}, banner=[("model", "llama")])
    )
    return progress


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_live_line_fits_the_terminal_and_gives_up_the_least_important(width):
    progress = started(terminal(width), overrides=MANY)
    for step, objective in enumerate(KINDS, start=1):
        progress.on_step(report_of(step, objective))
    shown = progress._live_line()
    assert shown.cell_len <= width
    assert shown.plain.startswith("step 6/400") and "reverse 1.250" in shown.plain
    assert shown.plain.count(" 1.250") == {40: 1, 80: 3, 120: 5, 200: 6}[width]
    assert "ETA" in shown.plain and (("tokens/s" in shown.plain) == (width >= 80))
    assert ("tiny_bico" in shown.plain) == (width == 200)
    progress.on_end(6, "preempted")


def test_a_loss_is_dim_until_its_objective_is_drawn_again():
    progress = started(terminal(120))
    progress.on_step(report_of(1, "bico", loss=2.5))
    progress.on_step(report_of(2, "ntp", loss=1.5))
    line = progress._live_line()
    dim = {line.plain[span.start : span.end] for span in line.spans if "dim" in str(span.style)}
    assert dim == {"bico", "2.500"}
    progress.on_end(2, "preempted")


def test_a_terminal_keeps_its_cursor_and_the_last_step_when_the_live_line_is_gone():
    console = terminal(120)
    progress = started(console)
    progress.on_step(report_of(1))
    shown = console.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), (
        "a process that ends at once cannot give it back"
    )
    progress.on_end(1, "preempted")
    assert re.search(r"\d\d:\d\d:\d\d  step 1/400  loss ntp 1\.250", console.file.getvalue())


def test_plain_lines_have_the_time_of_day_rates_and_what_is_left(monkeypatch):
    clock = iter(range(0, 10_000, 60))  # so a line for every step
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO())
    progress = started(console)
    for step in range(1, 4):
        progress.on_step(report_of(step))
    first, *_, last = [line for line in console.file.getvalue().splitlines() if "step" in line]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  step 3/400  loss ntp 1\.250  norm 1\.00  lr 1\.0e-03  200 tokens/s  wait 20\.0%  "
        r"ETA (.+)", last,
    )  # fmt: skip
    assert "ETA" not in first, "nothing is known of the pace yet"
    assert not console.file.getvalue().count("\x1b")


def test_what_is_left_counts_evaluations_and_not_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    pace = module._Pace()
    for moment in (1000.0, 1002.0, 1020.0):  # between the last two an evaluation
        now[0] = moment
        pace.step()
    assert pace.seconds_for(30) == 300.0


def test_a_quiet_console_shows_messages_evaluations_and_the_end_and_logs_the_rest(caplog):
    console = Console(file=io.StringIO())
    with caplog.at_level(logging.INFO, logger="bico_ds"):
        progress = started(console, quiet=True)
        progress.on_step(report_of(1))
        progress.on_note("note: an aside")
        progress.on_message("step 1: no checkpoint: disk full")
        progress.on_numbers(1, "evaluation", {"evaluation/n2d/headline": 0.25})
        progress.on_end(1, "preempted")
    assert console.file.getvalue().splitlines() == [
        "step 1: no checkpoint: disk full",
        "step 1  evaluation  n2d 0.250",
        "preempted after step 1",
    ]
    logged = "\n".join(caplog.messages)
    assert all(text in logged for text in ("model  llama", "step 1/400", "note: an aside", "preempted after"))
    assert all(record.told for record in caplog.records)


@pytest.mark.parametrize("width", [80, 120])
def test_a_banner_wraps_between_words_and_below_its_beginning(width):
    words = "a path that is long, " * 12
    console = terminal(width)
    console.print(module.banner_table([("model", "llama"), ("global batch", words)]))
    lines = Text.from_ansi(console.file.getvalue()).plain.splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 2
    assert all(line.startswith(" " * 14) for line in lines[2:])
    assert " ".join(" ".join(lines[1:]).split()) == "global batch " + words.strip()


def test_a_banner_says_what_the_plan_and_the_recipe_say():
    plan = tiny_plan()
    recipe = load_recipe("tiny_bico", ["model.path=runs/base", "model.lora={rank: 2, targets: [q_proj]}"])
    stream = StreamReport(
        objectives=("ntp", "bico"), bins=50, sequences=960, tokens=9_293, longest=40, fill=0.984, most_sequences_per_bin=5,
        passes={}, shares={}, cut={},
    )  # fmt: skip
    lines = dict(
        banner(
            recipe, architecture=plan.architecture, zero=plan.deployment.zero, backend=None, ranks=2, nodes=1, steps=100,
            probabilities=(0.25, 0.75), streams=[stream], plan=None, place="runs/x, goes on from step 5",
        )
    )  # fmt: skip
    assert len(lines) == 10
    assert lines["model"] == "llama, 3 layers of width 128, from runs/base"
    trained = plan.architecture.trained_parameters(recipe.model.lora)
    assert lines["parameters"] == f"697,984, of which adapters of rank 2 train {trained:,}"
    assert lines["ranks"].startswith("2 on 1 node; ") and lines["ranks"].endswith("ZeRO 3")
    assert lines["objectives"] == "ntp 25%, bico 75% (40% masked, by token)"
    assert lines["data"].endswith("fill 0.984; 8.00 epochs"), "100 steps of 4 bins are 8 times 50 bins"
    assert (lines["memory"], lines["time"]) == ("not planned", "not planned")
    assert lines["run folder"] == "runs/x, goes on from step 5"


def test_the_loop_draws_the_live_line_itself_and_at_most_once_a_second(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    threads = set(threading.enumerate())
    progress = started(terminal(120))
    assert set(threading.enumerate()) <= threads
    drawn: list[str] = []
    refresh = progress._live.refresh
    monkeypatch.setattr(
        progress._live, "refresh", lambda: (drawn.append(progress._live_line().plain), refresh())
    )
    for step in range(1, 30):
        progress.on_step(report_of(step))
        now[0] += 0.25
    assert [re.match(r"step \d+", line)[0] for line in drawn] == [f"step {n}" for n in range(1, 30, 4)]
    progress.on_end(29, "preempted")


def test_a_message_stands_above_a_live_line_that_is_not_of_an_earlier_step():
    console = terminal(120)
    progress = started(console)
    for step in range(1, 4):
        progress.on_step(report_of(step))
    progress.on_message("step 3  evaluation")
    shown = Text.from_ansi(console.file.getvalue().rpartition("step 3  evaluation")[2]).plain
    assert re.search(r"step (\d+)/400", shown)[1] == "3"
    progress.on_end(3, "preempted")
