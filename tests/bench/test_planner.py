"""The published runs: their figures agree under their own conventions, and their plans are of the same step."""

from __future__ import annotations

import pytest

from tests import ROOT
from tools.bench.planner import compared, page, published_runs, rows
from tools.bench.published_runs import mpt_70b

RUNS = {run.name: run for run in published_runs()}


@pytest.mark.parametrize("run", [run for run in RUNS.values() if run.mfu], ids=lambda run: run.name)
def test_the_published_tokens_give_the_published_mfu(run):
    assert run.mfu_of_tokens() == pytest.approx(run.mfu, rel=0.005)


def test_mpt_70b_has_as_many_parameters_as_its_row_says():
    """But for the second bias of each norm and the position embeddings, which the planner's architecture leaves out."""
    left_out = 2 * 80 * 8192 + 8192 + 2048 * 8192
    assert mpt_70b().parameters + left_out == 64_862_437_376


@pytest.mark.parametrize(
    ("name", "sequences", "seconds"),
    [
        ("MPT-70B, 64 GPUs", 2048, 2048 * 2048 / 66523),
        ("Llama-3 70B, 64 GPUs", 128, 18.90),
        ("Llama-3 8B, LoRA, 1 GPU", 32, 10.51),
        ("Llama-3 70B, LoRA, 8 GPUs", 32, 15.00),
        ("Llama-3.1 70B, 256 GPUs", 512, 512 * 8192 / 652.4 / 256),
    ],
)
def test_our_step_has_the_tokens_of_the_published_one_and_its_time(name, sequences, seconds):
    run = RUNS[name]
    assert run.recipe().training.global_batch_bins == sequences
    assert run.seconds_per_step() == pytest.approx(seconds, rel=2e-3)


def test_the_page_is_what_the_command_writes():
    """Figures that no machine changes: a change of the planner that moves them writes the page again."""
    found = [compared(run) for run in RUNS.values()]
    assert (ROOT / "docs" / "benchmarks" / "planner.md").read_text(encoding="utf-8") == page(found)
    assert all(row["ratio"] == row["ours"] / row["other"] for row in rows(found))
