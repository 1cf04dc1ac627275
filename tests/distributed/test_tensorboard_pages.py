"""What a person sees of a real run in TensorBoard, before and after a resume: each tab, and nothing twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import Visit, visit
from tests.commands.show.test_tensorboard import TASKS, served, texts
from tests.distributed.launching import train
from tests.waiting import waited

pytestmark = pytest.mark.distributed

SETTINGS = (
    "model.path=null", "evaluation.limit=8", "schedule.warmup_steps=1", "schedule.decay_steps=1",
    "evaluation.every_steps=3", "checkpoint.every_steps=3", "checkpoint.export=false", "monitor.every_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A finished run of six steps, and the same after it went on to nine with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    later = ("training.steps=9", "optimizer.lr=1e-3")
    for settings in (("training.steps=6",), later):
        done = train("tiny_bico", folder / "tiny_bico", *SETTINGS, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        if settings is not later:
            shutil.copytree(folder / "tiny_bico", folder / "before")
    return folder


def shown(run: Path) -> dict[str, list[int]]:
    """The steps of all curves, pictures and texts, by tag."""
    events = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()
    read = {"scalars": events.Scalars, "images": events.Images, "tensors": events.Tensors}
    return {tag: [event.step for event in read[kind](tag)] for kind in read for tag in events.Tags()[kind]}


@pytest.mark.parametrize(("run", "evaluations"), [("before", [3, 6]), ("tiny_bico", [3, 6, 9])])
def test_nothing_is_there_twice(runs, run, evaluations):
    steps = shown(runs / run)
    assert {tag: of for tag, of in steps.items() if max(Counter(of).values()) > 1} == {}
    answered = [f"1 reversal/{task}/answers" for task in TASKS]
    for tag in ("1 reversal/curves", "7 data/who sees whom/bico", "4 speed/pictures_seconds", *answered):
        assert steps[tag] == evaluations, tag
    for tag in (
        "8 details/recipe",
        "8 details/versions",
        "7 data/streams",
        "_hparams_/session_start_info",
        "custom_scalars__config__",
    ):
        assert steps[tag] == [0], tag
    assert steps["2 loss/all"] == list(range(1, evaluations[-1] + 1))


def counted(address: str, plugin: str, of: str, run: str, tag: str) -> int:
    """How many points, pictures or texts TensorBoard itself has of a tag; it reads them while it answers."""
    try:
        with urlopen(f"{address}data/plugin/{plugin}/{of}?run={quote(run)}&tag={quote(tag)}") as answer:
            return len(json.load(answer))
    except HTTPError:
        return 0


def lies_above(seen: Visit, *words: str) -> bool:
    """Whether each of these stands on the page, one below the other."""
    places = [seen.page.get_by_text(word, exact=True).first.bounding_box() for word in words]
    heights = [place["y"] for place in places if place is not None]
    return len(heights) == len(words) and heights == sorted(heights)


def heads(seen: Visit) -> list[str]:
    """Of the columns of HPARAMS; the first two are of the run's name and of a box to tick."""
    return texts(seen, "tf-hparams-table-view vaadin-grid-cell-content")


@pytest.mark.browser
def test_no_tab_is_empty_and_each_counts_as_many_as_there_are(runs, tmp_path):
    expected = {
        (plugin, of, run, tag): count
        for run, evaluations in (("before", 2), ("tiny_bico", 3))
        for plugin, of, tag, count in (
            ("images", "images", "1 reversal/curves", evaluations),
            ("images", "images", "7 data/who sees whom/bico", evaluations),
            ("text", "text", "1 reversal/n2d_reverse/answers", evaluations),
            ("text", "text", "8 details/recipe", 1),
            ("scalars", "scalars", "1 reversal/n2d_reverse", evaluations),
            ("scalars", "scalars", "2 loss/all", 3 * evaluations),
        )
    }
    with served(runs, tmp_path / "log") as (_, address):
        waited(lambda: {tag: counted(address, *tag) for tag in expected} == expected)
        look_at_each_tab(address)
        assert {tag: counted(address, *tag) for tag in expected} == expected, "and no more"


def look_at_each_tab(address: str) -> None:
    with visit(f"{address}#images", height=2600) as seen:
        waited(lambda: lies_above(seen, "1 reversal", "7 data"))
        waited(lambda: seen.page.locator("tf-image-loader").count() == 4)
        seen.page.goto(f"{address}#text")
        waited(lambda: lies_above(seen, "1 reversal", "7 data", "8 details"))
        waited(lambda: "the model’s answer" in "".join(texts(seen, "tf-text-loader th")))
        seen.page.goto(f"{address}#hparams")
        # What differs between the two, then other settings as far as there is room, then the scores.
        scores = [f"1 reversal/{task}" for task in sorted(TASKS)]
        waited(lambda: heads(seen)[2:4] == ["optimizer.lr", "training.steps"] and heads(seen)[7:11] == scores)
        for tab, card in {
            "timeseries": "card-view",
            "custom_scalars": "tf-custom-scalar-margin-chart-card",
        }.items():
            seen.page.goto(f"{address}#{tab}")
            waited(lambda card=card: seen.page.locator(card).count() >= 4)
        assert seen.errors == []
