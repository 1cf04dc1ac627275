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
    """`old`: the fixture, resumed; `new`: the same recipe from its beginning, by this program alone."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.copytree(EARLIER_RUN / "store", folder / "store")
    shutil.copytree(EARLIER_RUN / "run", folder / "old")
    for name in ("old", "new"):
        done = train(str(EARLIER_RUN / "mixed.yaml"), folder / name, ranks=1)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"{name}.out").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((EARLIER_RUN / "uninterrupted.json").read_text())


def curve(run: Path) -> list[dict[str, float]]:
    lines = metrics(run)
    return [{k: v for k, v in line.items() if k != "kind" and not k.startswith("speed/")} for line in lines]


def test_it_goes_on_where_it_stopped_and_finds_nothing_changed(runs):
    out = (runs / "old.out").read_text()
    assert f"step {STOP}, the newest complete checkpoint" in out
    assert "changed" not in out and "other layout" not in out
    assert json.loads((runs / "old" / "state.json").read_text())["state"] == "done"


def test_the_sample_stream_and_the_totals_are_those_of_a_run_without_a_stop(runs, expected):
    for run in ("old", "new"):
        loader = final_manifest(runs / run, STEPS)["state"]["loader"]
        assert {key: loader[key] for key in expected["loader"]} == expected["loader"]
    old, new = (final_manifest(runs / run, STEPS)["state"]["loader"] for run in ("old", "new"))
    assert old == new


def test_losses_weights_and_moments_are_those_of_a_run_without_a_stop(runs, expected):
    """To the bit where this machine rounds as the one that began the run did; else as near as rounding allows."""
    resumed, straight = (final_manifest(runs / run, STEPS) for run in ("old", "new"))
    if final_manifest(runs / "new", STOP)["checksums"] == final_manifest(runs / "old", STOP)["checksums"]:
        assert resumed["checksums"] == straight["checksums"] == expected["checksums"]
        assert curve(runs / "old") == curve(runs / "new") == expected["curve"]
    assert resumed["optimizer_steps"] == straight["optimizer_steps"] == expected["optimizer_steps"]
    for line, other, wanted in zip(*map(curve, (runs / "old", runs / "new")), expected["curve"], strict=True):
        assert line.keys() == other.keys() == wanted.keys()
        assert list(line.values()) == pytest.approx(list(other.values()), rel=1e-4)
        assert list(line.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
