"""A run that release 0.1.0 began is finished by this one, as if it had never been interrupted.

tests/fixtures/run_of_0_1_0 holds its run folder at step 6 of 12 (one CPU rank, ZeRO-3), the store it trained on, its
recipe, and in uninterrupted.json what release 0.1.0 itself came to without a stop.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import EARLIER_RUN
from tests.distributed.launching import metrics, train
from tests.distributed.survival import final_manifest

STOP, STEPS = 6, 12

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`old`: the fixture, resumed. The same recipe from its beginning has other masks today: a second BICO draws its own."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.copytree(EARLIER_RUN / "store", folder / "store")
    shutil.copytree(EARLIER_RUN / "run", folder / "old")
    done = train(str(EARLIER_RUN / "mixed.yaml"), folder / "old", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "old.out").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((EARLIER_RUN / "uninterrupted.json").read_text())


# What is measured, and what a run that release 0.1.0 began cannot know.
OTHERS = ("kind", "speed/", "work/", "share/", "memory/", "optimizer/clipped_share")


def curve(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(OTHERS)} for line in metrics(run)]


def test_it_goes_on_where_it_stopped_and_finds_nothing_changed(runs):
    out = (runs / "old.out").read_text()
    assert f"step {STOP}, the newest complete checkpoint" in out
    assert "changed" not in out and "other layout" not in out
    assert json.loads((runs / "old" / "state.json").read_text())["state"] == "done"


def test_the_sample_stream_and_the_totals_are_those_of_a_run_without_a_stop(runs, expected):
    loader = final_manifest(runs / "old", STEPS)["state"]["loader"]
    assert {key: loader[key] for key in expected["loader"]} == expected["loader"]


def test_losses_weights_and_moments_are_those_of_a_run_without_a_stop(runs, expected):
    """As near as another machine's rounding allows: other masks of one objective are a hundred times further off."""
    resumed = final_manifest(runs / "old", STEPS)
    assert resumed["optimizer_steps"] == expected["optimizer_steps"]
    for line, wanted in zip(curve(runs / "old"), expected["curve"], strict=True):
        assert line.keys() == wanted.keys()
        assert list(line.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
