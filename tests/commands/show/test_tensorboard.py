"""bico-ds tensorboard: runs under the names of their folders, and the page that a person sees first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bico_ds.commands.show.tensorboard import RunLinks, main
from bico_ds.config.load import load_recipe
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import RunStart
from bico_ds.training.callbacks.tensorboard.about import About
from bico_ds.training.callbacks.tensorboard.board import Board
from bico_ds.training.callbacks.tensorboard.charts import as_summary, charts
from tests import ROOT
from tests.browser import Visit, visit
from tests.waiting import waited

TASKS = ("n2d", "d2n", "n2d_reverse", "d2n_reverse")
EVENTS = "events.out.tfevents.1.host.1.0"


def touched(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def names(tmp_path: Path, *folders: Path) -> list[str]:
    links = RunLinks(folders, tmp_path / "links")
    links.refresh()
    return links.names


def test_runs_are_named_by_their_folders_at_any_depth(tmp_path):
    runs = tmp_path / "runs"
    touched(runs / "tiny_bico/tensorboard" / EVENTS, runs / "seed-11/tiny_bico/tensorboard" / EVENTS)
    touched(runs / "of another program" / EVENTS, runs / "tiny_bico/nested/tensorboard" / EVENTS)
    assert names(tmp_path, runs) == [
        "of another program", "seed-11/tiny_bico", "tiny_bico", "tiny_bico/nested",
    ]  # fmt: skip


def test_a_name_has_nothing_that_its_pictures_would_be_missing_for(tmp_path):
    touched(tmp_path / "runs" / 'a "b" \\c\nd\udcff é' / "tensorboard" / EVENTS)
    (name,) = names(tmp_path, tmp_path / "runs")
    assert json.dumps(name, ensure_ascii=False) == f'"{name}"' and name.endswith(" é") and name.isprintable()
    assert len(name) == len('a "b" \\c\nd\udcff é')


def test_a_run_that_is_named_twice_is_one_run(tmp_path):
    runs = tmp_path / "runs"
    touched(runs / "mine/tensorboard" / EVENTS, runs / "other/tensorboard" / EVENTS)
    assert names(tmp_path, runs / "mine", runs / "other" / ".." / "mine") == ["mine"]
    assert names(tmp_path, runs / "mine", runs) == ["mine", "runs/other"]


def test_a_port_that_is_none_is_a_mistake_of_usage(tmp_path, capsys):
    assert main([str(tmp_path), "--port", "65536"]) == 2
    assert "--port 65536: the last one is 65535" in capsys.readouterr().err


def test_what_a_start_set_aside_or_left_half_written_is_no_run(tmp_path):
    run = tmp_path / "runs" / "mine"
    touched(run / "replaced-1/tensorboard" / EVENTS, run / "checkpoints/step-000001" / EVENTS)
    touched(run / "tensorboard" / f".{EVENTS}.00000000.incomplete", run / "tensorboard" / "notes.txt")
    assert names(tmp_path, tmp_path / "runs") == []
    touched(run / "tensorboard" / EVENTS)
    assert names(tmp_path, tmp_path / "runs") == ["mine"]


@pytest.mark.parametrize("inner", ["", "tensorboard"])
def test_a_single_run_has_its_own_name(tmp_path, monkeypatch, inner):
    touched(tmp_path / "runs/mine/tensorboard" / EVENTS)
    monkeypatch.chdir(tmp_path / "runs/mine" / inner)
    assert names(tmp_path, Path(".")) == ["mine"]


def test_several_folders_begin_the_names_of_their_runs(tmp_path):
    for folder in ("a/runs", "b/runs", "c"):
        touched(tmp_path / folder / "mine/tensorboard" / EVENTS)
    folders = [tmp_path / "a/runs", tmp_path / "b/runs", tmp_path / "c/mine"]
    assert names(tmp_path, *folders) == ["mine", "runs/mine", "runs_2/mine"]


def test_links_follow_the_runs_also_through_links_that_lead_round(tmp_path):
    runs, links = tmp_path / "runs", RunLinks([tmp_path / "runs"], tmp_path / "links")
    touched(tmp_path / "scratch/far/tensorboard" / EVENTS)
    runs.mkdir()
    (runs / "far").symlink_to(tmp_path / "scratch/far")
    (runs / "round").symlink_to(runs)
    links.refresh()
    assert links.names == ["far"]
    touched(runs / "far/tensorboard" / EVENTS.replace("1", "2", 1))
    (tmp_path / "scratch/far/tensorboard" / EVENTS).unlink()
    links.refresh()
    assert [path.name for path in (tmp_path / "links/far").iterdir()] == [EVENTS.replace("1", "2", 1)]


def test_a_folder_that_is_not_there_is_refused_in_one_message(tmp_path, capsys):
    assert main([str(tmp_path / "runz")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'runz'}: no such folder; name the one that holds your runs: bico-ds tensorboard FOLDER\n"
    )


def written_run(folder: Path, recipe_name: str, *, asks: bool) -> None:
    """A run's curves, as the board makes them of lines of metrics.jsonl."""
    run, recipe = RunFolder(folder), load_recipe(recipe_name)
    run.path.mkdir(parents=True)
    layout = as_summary(charts(recipe, has_mfu=True))
    start = RunStart(recipe=recipe, first_step=0, total_steps=20, summary={})
    board = Board(run, first_step=0, about=About(run, start, layout), mfu="of a peak", tell=print)
    for step in (10, 20):
        numbers = {f"loss/{name}": 1 / step for name in ("all", "ntp", "bico")}
        numbers |= {"data/fill": 0.9, "speed/mfu": 0.3, "optimizer/grad_norm": 1.0, "memory/peak_gb": 0.1}
        board.add(step, "train", numbers)
        if asks:
            asked = {f"evaluation/{task}/headline": step / 20 for task in TASKS}
            bounds = {f"evaluation/{task}/headline_{end}": 0.5 for task in TASKS for end in ("low", "high")}
            board.add(step, "evaluation", asked | bounds | {"evaluation/n2d/exact": 0.0})
    board.write_waiting()


@contextmanager
def served(runs: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command on this folder, at a free port, and its address."""
    command = [sys.executable, "-m", "bico_ds", "tensorboard", str(runs), "--port", "0", "--"]
    command += ["--reload_interval", "1"]
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        yield server, waited(lambda: re.search(r"http://localhost:\d+/", log.read_text()))[0]
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def runs_shown(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}data/runs") as answer:
        return json.load(answer)


@pytest.mark.browser
def test_the_first_page_answers_the_first_questions_and_runs_that_begin_appear(tmp_path):
    runs = tmp_path / "runs"
    written_run(runs / "tiny_base", "tiny_base", asks=False)
    written_run(runs / "tiny_bico", "tiny_bico", asks=True)
    with served(runs, tmp_path / "log") as (server, address):
        waited(lambda: runs_shown(address) == ["tiny_base", "tiny_bico"])
        with visit(f"{address}?smoothing=0#timeseries", height=2600) as seen:
            # The first groups, whole: a page of a group has twelve cards.
            reversal = [f"1 reversal/{task}" for task in sorted(TASKS)]
            cards = [*reversal, "2 loss/all", "2 loss/bico", "2 loss/ntp"]
            waited(lambda: texts(seen, "card-view .tag") == cards)
            assert texts(seen, ".group-title") == [
                "Pinned", "1 reversal", "2 loss", "4 speed", "5 memory", "6 optimizer", "7 data", "8 details",
            ]  # fmt: skip
            seen.page.goto(f"{address}#custom_scalars")
            tasks = ["N2D, forward", "N2D, REVERSE", "D2N, forward", "D2N, REVERSE"]
            waited(lambda: [title.partition(":")[0] for title in margin_charts(seen)] == tasks)
            assert seen.errors == []
        written_run(runs / "seed-11" / "tiny_ntp", "tiny_ntp", asks=True)
        waited(lambda: "seed-11/tiny_ntp" in runs_shown(address))
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        assert server.wait(timeout=30) == 0
    assert f"2 run(s) in {runs}: tiny_base, tiny_bico" in (tmp_path / "log").read_text()


def texts(seen: Visit, selector: str) -> list[str]:
    return ["".join(text.split("\n")) for text in seen.page.locator(selector).all_inner_texts()]


def margin_charts(seen: Visit) -> list[str]:
    """The titles, in the order of the page."""
    cards = seen.page.locator("tf-custom-scalar-margin-chart-card")
    return cards.evaluate_all("all => all.map(it => it.title)")
