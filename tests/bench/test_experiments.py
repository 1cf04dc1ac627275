"""The experiments on SmolLM2: what is kept was made by the settings of its name, and a page quotes it."""

from __future__ import annotations

import json

import pytest

from tests import ROOT
from tools.bench.cures import SIDE_BY_SIDE
from tools.bench.experiments import PARTS
from tools.bench.retention import FORGETTING

PAGES = {"results.md": FORGETTING, "cures.md": SIDE_BY_SIDE}
SCORES = [
    pytest.param(experiment, path, id=f"{experiment.name}-{path.stem}")
    for experiment in PAGES.values()
    for path in sorted(experiment.kept.glob("*/*.json"))
    if "blend" not in path.stem
]


@pytest.mark.parametrize(("experiment", "path"), SCORES)
def test_a_run_was_made_with_the_settings_of_its_name(experiment, path):
    run = experiment.runs[str(path.relative_to(experiment.kept).with_suffix(""))]
    command = json.loads(path.read_text(encoding="utf-8"))["command"].replace("'", "").replace(f"{ROOT}/", "")
    of_training = [x.replace(f"{ROOT}/", "") for x in run.settings if not x.startswith("evaluation.")]
    expected = [f"--set {x}" for x in (f"training.steps={run.steps}", *of_training)]
    assert not [x for x in (f"--recipe {run.recipe}", *expected) if x not in command]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_the_figures_that_are_kept(page, part):
    text = (ROOT / "docs" / "benchmarks" / page).read_text(encoding="utf-8")
    rows = [line for table in PAGES[page].tables(part) for line in table.splitlines()[2:]]
    assert not [row for row in rows if row not in text]
