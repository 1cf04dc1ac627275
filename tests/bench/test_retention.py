"""The experiment on forgetting: what is kept was made by the settings of its name, and the page quotes it."""

from __future__ import annotations

import json

import pytest

from tests import ROOT
from tools.bench.retention import FORGETTING, RUNS

KEPT = FORGETTING.kept
SCORES = sorted(path for path in KEPT.glob("*/*.json") if "blend" not in path.stem)


@pytest.mark.parametrize("path", SCORES, ids=lambda path: path.stem)
def test_a_run_was_made_with_the_settings_of_its_name(path):
    run = RUNS[str(path.relative_to(KEPT).with_suffix(""))]
    command = json.loads(path.read_text(encoding="utf-8"))["command"].replace("'", "")
    of_training = [setting for setting in run.settings if not setting.startswith("evaluation.")]
    missing = [x for x in (f"training.steps={run.steps}", *of_training) if f"--set {x}" not in command]
    assert not missing


@pytest.mark.parametrize("part", ["search", "final"])
def test_the_page_shows_the_scores_that_are_kept(part):
    page = (ROOT / "docs" / "benchmarks" / "results.md").read_text(encoding="utf-8")
    assert not [line for line in FORGETTING.table(part).splitlines()[2:] if line not in page]
